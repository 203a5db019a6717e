import dataclasses

import jax
import numpy as np
import pytest
import torch
from conftest import TEXT, random_params
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

from jaxgpt import BPETokenizer, CharTokenizer
from jaxgpt.config import ClassifierConfig, MaskedLMConfig, Seq2SeqConfig
from jaxgpt.interop.encoder_export import write_encoder
from jaxgpt.models import build_model
from jaxgpt.text.labelled import encode_texts
from jaxgpt.text.pairs import encode_sources
from jaxgpt.text.tokenizer import END_OF_TEXT, MASK

BPE = BPETokenizer.train([TEXT], 290).with_special([MASK])
CHARS = CharTokenizer.from_text(TEXT).with_special([END_OF_TEXT])
SIZES = {"block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32, "unroll": 1}
MLM = MaskedLMConfig(**SIZES, vocab_size=BPE.vocab_size)
SEQ2SEQ = Seq2SeqConfig(**SIZES, vocab_size=CHARS.vocab_size)
SOURCES = ["Juliet tells", "a tale", ""]


def exported(folder, config, tokenizer):
    """The model and its parameters, none of which is 0 or 1; writes it to `folder`."""
    model = build_model(config, "cpu")
    params = random_params(model, mean=0.02, std=0.25)
    write_encoder(folder, config, params, tokenizer)
    return model, params


def padded(sequences):
    """A batch of all texts, and which tokens are not padding."""
    lengths = sequences.lengths
    tokens = sequences.padded(np.arange(len(sequences)), lengths.max())
    return tokens, lengths, np.arange(lengths.max()) < lengths[:, None]


@pytest.mark.parametrize("bias", [False, True])
def test_an_exported_masked_lm_has_our_logits_and_tokens_in_transformers(
    tmp_path, bias
):
    config = dataclasses.replace(MLM, bias=bias)
    model, params = exported(tmp_path, config, BPE)
    tokens_BT, lengths_B, real_BT = padded(encode_texts(SOURCES, BPE, 16))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    batch = theirs(SOURCES, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(batch.attention_mask, real_BT)
    np.testing.assert_array_equal(batch.input_ids[real_BT], tokens_BT[real_BT])
    assert theirs(MASK).input_ids == [BPE.end_of_text, BPE.special_id(MASK)]
    assert theirs.mask_token_id == BPE.special_id(MASK)
    reference = AutoModelForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected_BTV = reference(**batch).logits.numpy()
    logits_BTV = jax.jit(model.apply)(
        {"params": params}, tokens_BT, lengths_B=lengths_B
    )
    assert np.abs(expected_BTV).max() > 1
    found, expected = logits_BTV[real_BT], expected_BTV[real_BT]
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_an_exported_seq2seq_has_our_logits_and_greedy_tokens_in_transformers(
    tmp_path, bias
):
    config = dataclasses.replace(SEQ2SEQ, bias=bias, gelu="tanh" if bias else "exact")
    model, params = exported(tmp_path, config, CHARS)
    apply, end = jax.jit(model.apply), CHARS.end_of_text
    source_BS, lengths_B, real_BS = padded(encode_sources(SOURCES, CHARS, 16))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    batch = theirs(SOURCES, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(batch.attention_mask, real_BS)
    np.testing.assert_array_equal(batch.input_ids[real_BS], source_BS[real_BS])
    reference = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    generated = reference.generate(**batch)[:, 1:].numpy()
    # Our greedy tokens, each from the logits of the whole text before it.
    tokens_BT = np.full((len(SOURCES), config.block_size), end)
    finished_B = np.zeros(len(SOURCES), bool)
    source = {"source_BS": source_BS, "lengths_B": lengths_B}
    for t in range(config.block_size):
        logits_BTV = apply({"params": params}, tokens_BT, **source)
        next_B = np.where(finished_B, end, logits_BTV[:, t].argmax(axis=-1))
        finished_B |= next_B == end
        if t + 1 < config.block_size:
            tokens_BT[:, t + 1] = next_B
    assert generated.shape[1] > 1
    targets_BT = np.concatenate([tokens_BT[:, 1:], next_B[:, None]], axis=1)
    np.testing.assert_array_equal(generated, targets_BT[:, : generated.shape[1]])
    with torch.no_grad():
        inputs = {"decoder_input_ids": torch.tensor(tokens_BT)}
        expected_BTV = reference(**batch, **inputs).logits.numpy()
    np.testing.assert_allclose(logits_BTV, expected_BTV, atol=2e-5)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (dataclasses.replace(MLM, gelu="tanh"), "gelu=tanh"),
        (Seq2SeqConfig(**SIZES, vocab_size=5, hide_source=True), "hide_source"),
        (ClassifierConfig(**SIZES, vocab_size=5, labels=("a", "b")), "classifier"),
    ],
)
def test_what_transformers_lacks_is_refused(tmp_path, config, name):
    with pytest.raises(ValueError, match=name):
        exported(tmp_path / "out", config, BPE)
    assert not (tmp_path / "out").exists()
