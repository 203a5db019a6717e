"""Exported runs of conversations: transformers' ids and answers are ours."""

import jinja2
import numpy as np
import pytest
from conftest import TEXT, random_params
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxgpt import BPETokenizer, CharTokenizer, GPTConfig, SamplingConfig
from jaxgpt.generation.decode import generate_tokens
from jaxgpt.interop.huggingface import read_tokenizer, write_huggingface
from jaxgpt.models import build_model
from jaxgpt.text.conversations import (
    CHAT_TOKENS,
    END_OF_TURN,
    Message,
    encode_turns,
)
from jaxgpt.text.pretrained import gpt2_tokenizer

PIECES = ["{{ bos_token }}", "{% for", "{#", "<|", "|>", "<|user", "end|>", " ", "\r\n"]
PIECES += ["\n", "\u200b", "e\u0301", "🙂", "tells", "winters."]
CONTENT = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=6)
CONTENT = CONTENT.map("".join).filter(
    lambda text: not any(token in text for token in CHAT_TOKENS)
)


def conversation(texts, system=False):
    """A conversation, as JSON has it."""
    roles = ["system"] * system + ["user", "assistant"] * len(texts)
    pairs = zip(roles, texts, strict=False)
    return [{"role": role, "content": text} for role, text in pairs]


def our_ids(tokenizer, messages, prompt=False):
    """The ids of training; of a prompt for an answer, too."""
    turns = encode_turns([Message(**each) for each in messages], tokenizer)
    last = [tokenizer.special_id("<|assistant|>")] * prompt
    return [tokenizer.end_of_text, *np.concatenate(turns).tolist(), *last]


def export(folder, tokenizer, **fields):
    """Exports a model with random parameters; returns it and them."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 2} | fields
    config = GPTConfig(vocab_size=tokenizer.vocab_size, **sizes)
    model = build_model(config, "cpu")
    params = random_params(model, mean=0)
    write_huggingface(folder, config, params, tokenizer)
    return model, params


@pytest.fixture(scope="module", params=["char", "bpe", "gpt2"])
def both(request, tmp_path_factory):
    """Our tokenizer with the tokens of conversations, and transformers' of an export.

    The characters lack most that a text may have.
    """
    ours = {
        "char": lambda: CharTokenizer.from_text(TEXT + "d{%}<|>\r\u0301🙂\\^-[]&"),
        "bpe": lambda: BPETokenizer.train([TEXT], 300),
        "gpt2": gpt2_tokenizer,
    }[request.param]().with_special(CHAT_TOKENS)
    folder = tmp_path_factory.mktemp(request.param)
    export(folder, ours)
    assert read_tokenizer(folder).to_json() == ours.to_json()
    return ours, AutoTokenizer.from_pretrained(folder)


@given(st.lists(CONTENT, min_size=1, max_size=5), st.booleans(), st.booleans())
@example([" Lear\r\n", "{{ 1 }}{% endfor %}", "\n  a \n", "<|end |>"], True, True)
def test_the_template_gives_the_ids_of_training(both, texts, system, prompt):
    ours, theirs = both
    messages = conversation(texts, system)
    options = {"add_generation_prompt": prompt, "return_dict": False}
    ids = theirs.apply_chat_template(messages, **options)
    assert ids == our_ids(ours, messages, prompt)


def test_a_special_token_in_a_text_is_parsed_unless_sanitized(both):
    ours, theirs = both
    messages = conversation(["Lear<|end|><|user|>"])
    parsed, as_text = (
        theirs.apply_chat_template(
            messages, return_dict=False, sanitize_control_tokens=sanitize
        )
        for sanitize in (False, True)
    )
    expected = our_ids(ours, messages)
    special = [ours.special_id(token) for token in CHAT_TOKENS]
    counts = [np.isin(ids, special).sum() for ids in (parsed, as_text, expected)]
    assert counts == [5, 3, 3]
    # The same text, which BPE may split into other tokens.
    assert ours.decode(as_text) == ours.decode(expected) == ours.decode(parsed)


@pytest.mark.parametrize("roles", ["au", "uu", "us", "ss", "u?"])
def test_the_template_refuses_roles_that_are_out_of_order(both, roles):
    names = {"u": "user", "a": "assistant", "s": "system"}
    messages = [{"role": names.get(r, "tool"), "content": "Lear"} for r in roles]
    with pytest.raises(jinja2.TemplateError):
        both[1].apply_chat_template(messages)


def test_transformers_generates_our_answers_until_the_turn_ends(tmp_path):
    tokenizer = CharTokenizer("ab", CHAT_TOKENS)
    model, params = export(tmp_path, tokenizer, n_embd=32, block_size=32)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    generator = AutoModelForCausalLM.from_pretrained(tmp_path)
    end, greedy = tokenizer.special_id(END_OF_TURN), SamplingConfig(temperature=0)
    ends = tokenizer.end_of_text, end
    for text in ("aaa", "abb"):
        messages = conversation([text])
        prompt = our_ids(tokenizer, messages, prompt=True)
        inputs = theirs.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt"
        )
        answer = generator.generate(**inputs, max_new_tokens=20, do_sample=False)
        drawn = generate_tokens(model, params, [prompt], 20, greedy, 1, ends)
        ids = np.concatenate([tokens[0] for tokens, _ in drawn]).tolist()
        length = ids.index(end) + 1
        assert 3 < length < 20
        assert answer[0].tolist() == prompt + ids[:length]
