"""Exports a masked-lm as Hugging Face's ESM, and a seq2seq as its Blenderbot.

Source: transformers, models/esm and models/blenderbot, which are pre-norm as ours are.
"""

from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.config import BlockConfig, MaskedLMConfig, ModelConfig, Seq2SeqConfig
from jaxgpt.interop import encoder_tensors
from jaxgpt.interop.huggingface import GELUS, write_model
from jaxgpt.text.tokenizer import END_OF_TEXT, MASK, Tokenizer


def write_encoder(
    folder: Path, config: ModelConfig, params: Any, tokenizer: Tokenizer
) -> None:
    """Writes a directory for AutoModelForMaskedLM or AutoModelForSeq2SeqLM.

    Its AutoTokenizer adds the end-of-text token where the model expects it. Biases that
    the model lacks are zero. Raises ValueError if transformers has no such model.
    """
    match config:
        case MaskedLMConfig():
            tensors, settings = _esm(config, params, tokenizer)
            special, template = {"mask_token": MASK}, f"{END_OF_TEXT} $A"
            generation = None
        case Seq2SeqConfig():
            tensors, settings, generation = _blenderbot(config, params, tokenizer)
            special, template = {}, f"$A {END_OF_TEXT}"
        case _:
            kind = getattr(config, "architecture", "other")
            raise ValueError(
                f"a {kind} can't be exported: transformers has no classifier of a "
                "pre-norm encoder with one linear layer as its head; use `python -m "
                "jaxgpt classify`, or export the masked-lm that it started from"
            )
    write_model(
        folder,
        tensors,
        settings | {"dtype": "float32", "tie_word_embeddings": True},
        tokenizer,
        config.block_size,
        tokenizer_settings=special | {"pad_token": END_OF_TEXT},
        template=template,
        generation=generation,
    )


def _tensors(
    config: BlockConfig, params: Any, layout: encoder_tensors.Layout
) -> dict[str, np.ndarray]:
    """The parameters' arrays, with biases of zero if there are none."""
    tensors = encoder_tensors.to_tensors(params, layout)
    embeddings = {layout.get(name) for name in ("wte", "wpe", "encoder.wpe")}
    if not config.bias:
        for name in [*tensors]:
            module = name.removesuffix(".weight")
            if module not in embeddings:
                zeros = np.zeros(len(tensors[name]), np.float32)
                tensors[f"{module}.bias"] = zeros
    return tensors


def _esm(
    config: MaskedLMConfig, params: Any, tokenizer: Tokenizer
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """ESM's tensors and settings. Raises ValueError if the GELU is not exact."""
    if config.gelu != "exact":
        raise ValueError(
            f"gelu={config.gelu} can't be exported: ESM, transformers' pre-norm "
            "encoder, has only the exact GELU; train with --model.gelu exact"
        )
    tensors = _tensors(config, params, encoder_tensors.ESM)
    tensors |= {
        "lm_head.bias": np.zeros(config.require_vocab_size(), np.float32),
        # Of a head for proteins, which is not used.
        "esm.contact_head.regression.weight": np.zeros(
            (1, config.n_layer * config.n_head), np.float32
        ),
        "esm.contact_head.regression.bias": np.zeros(1, np.float32),
    }
    return tensors, {
        "model_type": "esm",
        "architectures": ["EsmForMaskedLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "position_embedding_type": "absolute",
        # ESM numbers the tokens that are not this one from its id + 1. -1 is no token,
        # so that positions begin at 0; transformers warns that it is not one.
        "pad_token_id": -1,
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_text,
        "mask_token_id": tokenizer.special_id(MASK),
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "layer_norm_eps": 1e-5,
        "emb_layer_norm_before": False,
        "token_dropout": False,
    }


def _blenderbot(
    config: Seq2SeqConfig, params: Any, tokenizer: Tokenizer
) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Blenderbot's tensors and settings, and those of `generate`."""
    config.require_source("exported")
    tensors = _tensors(config, params, encoder_tensors.BLENDERBOT)
    logits_bias = np.zeros((1, config.require_vocab_size()), np.float32)
    special = dict.fromkeys(
        ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
        tokenizer.end_of_text,
    )
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("layers", config.n_layer),
            ("attention_heads", config.n_head),
            ("ffn_dim", 4 * config.n_embd),
            ("layerdrop", 0.0),
        )
    }
    # Blenderbot's own defaults would change what is generated.
    plain = {"encoder_no_repeat_ngram_size": 0, "forced_eos_token_id": None}
    settings = {
        "model_type": "blenderbot",
        "architectures": ["BlenderbotForConditionalGeneration"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "d_model": config.n_embd,
        "activation_function": GELUS[config.gelu],
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "activation_dropout": 0.0,
        "scale_embedding": False,
        "is_encoder_decoder": True,
    }
    generation = {"max_length": config.block_size + 1}  # with the start token
    return (
        tensors | {"final_logits_bias": logits_bias},
        settings | sides | special | plain,
        special | plain | generation,
    )
