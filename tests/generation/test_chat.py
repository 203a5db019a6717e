import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgpt import BPETokenizer, SamplingConfig, chat, load_run
from jaxgpt.generation import chat as module
from jaxgpt.generation.chat import answer, chat_prompt
from jaxgpt.generation.decode import generate_tokens
from jaxgpt.text.conversations import CHAT_TOKENS, Message

BYTES = BPETokenizer.train(["a"], 256 + len(CHAT_TOKENS), special=CHAT_TOKENS)
GREEDY = SamplingConfig(temperature=0)
HELLO = [Message("user", "Lear tells a tale")]


@pytest.fixture(scope="module")
def run(untrained):
    return load_run(untrained / "chat")


def turn(message):
    text = f"<|{message.role}|>{message.content}<|end|>"
    return BYTES.encode_prompt(text).tolist()


@given(
    st.text("s", max_size=9),
    st.lists(st.text("abc", min_size=1, max_size=9), min_size=1, max_size=9),
    st.integers(4, 200),
)
def test_the_oldest_exchanges_leave_the_prompt_until_a_quarter_is_free(
    system, texts, block_size
):
    texts = texts[: len(texts) // 2 * 2 + 1] + ["x"] * (1 - len(texts) % 2)
    head = [Message("system", system)] if system else []
    turns = [
        Message(("user", "assistant")[n % 2], each) for n, each in enumerate(texts)
    ]

    def prompt(unseen):
        kept = [id_ for each in head + turns[unseen:] for id_ in turn(each)]
        return BYTES.encode_prompt("<|endoftext|>").tolist() + kept + [answer_id]

    def is_enough(unseen):
        return block_size - len(prompt(unseen)) >= block_size / 4

    (answer_id,) = BYTES.encode_prompt("<|assistant|>").tolist()
    exchanges = range(0, len(turns), 2)
    expected = next(filter(is_enough, exchanges), exchanges[-1])
    found = chat_prompt(head + turns, BYTES, block_size)
    assert found == (prompt(expected), expected)


def test_an_answer_beyond_the_window_is_that_of_generate_tokens(run):
    lines, T = [], run.config.model.block_size
    ids, _ = chat_prompt(HELLO, run.tokenizer, T)
    ends = tuple(map(run.tokenizer.special_id, CHAT_TOKENS))
    drawn = generate_tokens(run.model, run.params, [ids], 100, GREEDY, 0, ends)
    tokens = np.concatenate([new[0] for new, _ in drawn])
    assert len(ids) < T < len(tokens) == 100
    text = "".join(answer(run, HELLO, 100, GREEDY, 0, lines.append))
    assert text == run.tokenizer.decode(tokens)
    (line,) = lines
    assert str(T) in line
    short = "".join(answer(run, HELLO, T - len(ids) + 1, GREEDY, 0, lines.append))
    assert text.startswith(short)
    assert len(lines) == 1  # every token of this one has seen the whole text


def test_a_last_message_longer_than_the_window_is_answered_and_told(run):
    lines = []
    long = [Message("user", "tale " * 40)]
    assert len("".join(answer(run, long, 3, GREEDY, 0, lines.append))) == 3
    assert len(lines) == 1


@pytest.mark.parametrize("token", CHAT_TOKENS)
def test_any_special_token_ends_an_answer(run, monkeypatch, token):
    end, (a, b) = run.tokenizer.special_id(token), run.tokenizer.encode("ae")

    def generate_tokens(model, params, prompts, count, sampling, seed, ends):
        assert end in ends
        yield np.array([[a, b]]), None
        yield np.array([[a, end, b]]), None

    monkeypatch.setattr(module, "generate_tokens", generate_tokens)
    assert chat(run, [{"role": "user", "content": "tale"}]) == "aea"


def test_chat_returns_what_is_streamed_and_checks_its_arguments(run):
    messages = [{"role": "system", "content": "Lear"}]
    messages += [{"role": "user", "content": "a tale"}]
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 9, "seed": 3}
    streamed = answer(
        run,
        [Message(*each.values()) for each in messages],
        20,
        SamplingConfig(1.0, 9),
        3,
    )
    assert chat(run, messages, **options) == "".join(streamed)
    assert chat(run, messages, **options | {"seed": 4}) != chat(
        run, messages, **options
    )
    with pytest.raises(ValueError, match="message 1, of the system, is empty"):
        chat(run, [{"role": "system", "content": " "}])
    with pytest.raises(ValueError, match="user"):
        chat(run, [*messages, {"role": "assistant", "content": "yes"}])
    for wrong in ({"max_new_tokens": 0}, {"top_k": 999}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            chat(run, messages, **wrong)
    with pytest.raises(TypeError, match="load_run"):
        chat("runs/x", messages)


def test_a_run_without_the_tokens_of_conversations_is_refused(untrained):
    for kind, instead in {"gpt": "chat-sft", "classifier": "jaxgpt classify"}.items():
        with pytest.raises(ValueError, match=instead):
            chat(load_run(untrained / kind), [{"role": "user", "content": "tale"}])
