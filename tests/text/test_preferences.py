import json

import numpy as np
import pytest
from conftest import TINY, changed, examples_config

from jaxgpt import BPETokenizer, CharTokenizer
from jaxgpt.config import DataConfig, PPOConfig
from jaxgpt.text import preferences, tasks
from jaxgpt.text.conversations import CHAT_TOKENS
from jaxgpt.text.corpus import load_corpus
from jaxgpt.text.preferences import encode_prompts, make_examples, open_preferences
from jaxgpt.text.tables import SPLITS
from jaxgpt.text.tokenizer import END_OF_TEXT

LETTERS = "".join(map(chr, range(32, 127)))
TOKENIZERS = {
    "char": CharTokenizer(LETTERS, CHAT_TOKENS),
    "bpe": BPETokenizer.train(["<|end|> tales of Lear"], 270, True, CHAT_TOKENS),
}
CONFIG = changed(
    TINY,
    model={"architecture": "reward", "block_size": 48, "vocab_size": None},
    data={"packing": "documents"},
)
HI = [{"role": "user", "content": "Hi"}]
PPO = PPOConfig(max_new_tokens=16)


def silent(line):
    """Logs nothing."""


def rows_of(folder, objects, has_responses=True):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, objects)))
    return open_preferences(DataConfig(path=(str(path),)), has_responses).read()


def examples_of(folder, objects, tokenizer, config=CONFIG, log=silent, split="all"):
    rows, split_N = rows_of(folder, objects, not config.ppo)
    arrays = preferences.tokenize(rows, tokenizer, config, log)
    return make_examples(arrays | {"split": split_N}, config, log, split)


def pair(prompt, chosen="Lear", rejected="Puck"):
    prompt = {"messages" if isinstance(prompt, list) else "prompt": prompt}
    return prompt | {"chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"chosen": "a", "rejected": "b"}, '"messages"'),
        (pair("a") | {"messages": HI}, '"messages"'),
        ([1], '"messages"'),
        (pair(7), '"prompt" must be text, not int'),
        ({"prompt": "a", "chosen": "b"}, '"rejected" must be text, not NoneType'),
        (pair("a", "b", " \n"), '"rejected" is empty'),
        (pair("a", "b", "b"), "chosen and rejected are the same"),
        (pair([{"role": "assistant", "content": "a"}]), "message 1"),
        (pair([*HI, {"role": "assistant", "content": "a"}]), "must be the user's"),
    ],
)
def test_a_line_that_is_no_preference_is_an_error_with_file_and_line(
    tmp_path, line, message
):
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{message}"):
        rows_of(tmp_path, [pair("a"), line])


def test_a_file_without_prompts_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no prompt"):
        rows_of(tmp_path, [])


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_prompt_is_encoded_as_the_policy_was_trained(tokenizer):
    end, user, answer, turn = map(
        tokenizer.special_id, (END_OF_TEXT, "<|user|>", "<|assistant|>", "<|end|>")
    )
    text = "<|end|> of"  # is text
    ids = tokenizer.encode(text).tolist()
    assert not set(ids) & {end, user, answer, turn}
    windows = changed(CONFIG, data={"packing": "windows"})
    prompts = [text, [["user", text]], ""]
    of_documents, of_chat, empty = encode_prompts(tokenizer, CONFIG, prompts)
    assert of_documents.tolist() == [end, *ids]
    assert of_chat.tolist() == [end, user, *ids, turn, answer]
    assert empty.tolist() == [end]
    of_windows, same, start = encode_prompts(tokenizer, windows, prompts)
    assert of_windows.tolist() == ids
    assert same.tolist() == of_chat.tolist()
    assert start.tolist() == tokenizer.encode(tokenizer.start).tolist()


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_pair_begins_with_the_example_of_its_bare_prompt(tmp_path, tokenizer):
    objects = [pair("of", "<|end|> a", "tales"), pair(HI)]
    pairs = examples_of(tmp_path, objects, tokenizer)
    config = changed(CONFIG, model={"architecture": "gpt"})
    config = type(config)(**vars(config) | {"ppo": PPO})
    prompts = examples_of(tmp_path, objects, tokenizer, config).prompts
    texts = ["<|end|> a", "tales", "Lear", "Puck"]
    turn = tokenizer.special_id("<|end|>")
    for n, text in enumerate(texts):
        prompt = prompts[n // 2].tolist()
        assert pairs.prompts_N[n // 2] == len(prompt)
        end = [turn] if n // 2 else []  # only of a response to messages
        assert pairs.texts[n].tolist() == [*prompt, *tokenizer.encode(text), *end]


def test_long_prompts_lose_their_beginning_and_long_responses_their_pair(tmp_path):
    tokenizer, lines = TOKENIZERS["char"], []
    long = "".join(LETTERS[n % 26 + 33] for n in range(60))
    objects = [pair("b" * 9), pair(long, "c" * 8, "d" * 10), pair("e", "f" * 48, "g")]
    pairs = examples_of(tmp_path, objects, tokenizer, log=lines.append)
    assert len(pairs) == 2
    assert pairs.lengths.tolist() == [1 + 9 + 4, 48]
    assert tokenizer.decode(pairs.texts[2]) == long[-38:] + "c" * 8
    assert ["1 pairs are left out" in line for line in lines] == [True, False]
    assert ["1 of 2 prompts are cut" in line for line in lines] == [False, True]
    with pytest.raises(ValueError, match="block_size=48"):
        examples_of(tmp_path, objects[2:], tokenizer)


def test_the_hash_of_the_prompt_alone_determines_the_split(tmp_path):
    prompts = [f"prompt {n}" for n in range(300)]
    one = rows_of(tmp_path, [pair(prompt, "a") for prompt in prompts])[1]
    other = rows_of(tmp_path, [pair(prompt, "b") for prompt in prompts])[1]
    bare = rows_of(tmp_path, [{"prompt": prompt} for prompt in prompts], False)[1]
    assert one.tolist() == other.tolist() == bare.tolist()
    counts = np.bincount(one)
    assert counts.sum() == 300
    assert all(10 < count < 60 for count in counts[1:])


def test_a_split_without_pairs_is_an_error_that_names_it(tmp_path):
    _, (found,) = rows_of(tmp_path, [pair("a")])
    split = SPLITS[int(found) - 1]
    with pytest.raises(ValueError, match=f"the {split} split has no prompts"):
        examples_of(tmp_path, [pair("a")], TOKENIZERS["char"], split=split)


def test_conversations_need_a_tokenizer_with_their_tokens(tmp_path):
    with pytest.raises(ValueError, match="special tokens"):
        examples_of(tmp_path, [pair(HI)], CharTokenizer(LETTERS, [END_OF_TEXT]))


@pytest.mark.usefixtures("fresh_cache")
def test_a_new_tokenizer_has_the_characters_of_prompts_and_responses(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = (pair("\xe9" + "a" * n, "b\\", '"') for n in range(100))
    path.write_text("\n".join(map(json.dumps, lines)))
    config = changed(CONFIG, data={"path": (str(path),)})
    corpus, _ = load_corpus(config, silent)
    assert corpus.tokenizer.characters == '"\\ab\xe9'


@pytest.mark.usefixtures("fresh_cache")
def test_cached_tokens_are_of_one_packing(tmp_path):
    config = examples_config(tmp_path, "reward")
    lengths = [
        load_corpus(changed(config, data={"packing": packing}), silent)[0].val.lengths
        for packing in ("windows", "documents", "windows")
    ]
    assert (lengths[0] + 1).tolist() == lengths[1].tolist()
    assert lengths[0].tolist() == lengths[2].tolist()


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("reward", {"path": ()}, "--data.path"),
        ("reward", {"weights": (1.0,)}, "--data.weights"),
        ("dpo", {"weights": (1.0,)}, "--data.weights"),
    ],
)
def test_settings_that_preferences_do_not_have_are_refused(
    tmp_path, kind, data, message
):
    config = examples_config(tmp_path, kind)
    assert tasks.kind_of(config) == "preferences"
    with pytest.raises(ValueError, match=message):
        load_corpus(changed(config, data=data), silent)


def test_a_run_with_characters_alone_gets_no_special_token(tmp_path):
    config = examples_config(tmp_path, "dpo")
    corpus, full = load_corpus(config, silent)
    assert not corpus.tokenizer.special
    assert full.model.vocab_size == 8
