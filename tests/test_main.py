"""What holds for generate.py and every command of `python -m jaxgpt`."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import assert_every_flag_is_explained, finish, start_script

from jaxgpt import generate, load_run
from jaxgpt.__main__ import COMMANDS

# The kinds of models that a command is for; it must refuse the other kinds.
LANGUAGE_MODELS = {"gpt", "layer-norm", "bigram"}
ENCODERS = {"classifier", "masked-lm", "seq2seq"}
OTHERS = {*ENCODERS, "reward"}
SERVES = {
    "generate.py --run-dir {}": LANGUAGE_MODELS,
    "jaxgpt evaluate --run-dir {} --stride 2": LANGUAGE_MODELS,
    "jaxgpt evaluate --run-dir {} --split test": OTHERS,
    "jaxgpt evaluate --run-dir {} --beams 2": {"seq2seq"},
    "jaxgpt classify --run-dir {} Lear": {"classifier"},
    "jaxgpt translate --run-dir {} Lear": {"seq2seq"},
    "jaxgpt chat --run-dir {}": LANGUAGE_MODELS,
    "jaxgpt attention --run-dir {} --prompt Lear": {"gpt", "layer-norm", *OTHERS},
    "jaxgpt compare --run-dir {}": {"gpt", *ENCODERS},
    "jaxgpt export nanogpt {} new": {"gpt"},
    "jaxgpt export huggingface {} new": {"gpt", "masked-lm", "seq2seq"},
}
INSTEAD = {
    **dict.fromkeys(LANGUAGE_MODELS, "generate.py"),
    "classifier": "jaxgpt classify",
    "masked-lm": "jaxgpt evaluate",
    "seq2seq": "jaxgpt translate",
    "reward": "--reward-model",
}


@pytest.mark.parametrize(
    "command", ["generate.py", *(f"jaxgpt {command}" for command in COMMANDS)]
)
def test_help_explains_every_flag(call, capsys, command):
    with pytest.raises(SystemExit) as stopped:
        call(*command.split(), "--help")
    assert stopped.value.code == 0
    assert_every_flag_is_explained(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("generate.py --run-dir x --tmperature 1", ["--temperature"]),
        ("jaxgpt", COMMANDS),
        ("jaxgpt evalute", COMMANDS),
    ],
)
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(
    call, capsys, command, names
):
    with pytest.raises(SystemExit) as stopped:
        call(*command.split())
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    for name in names:
        assert name in error


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        ("generate.py --run-dir x --prompt -The", ["--prompt=-The"]),
        ("generate.py --prompt --", ["--prompt=--"]),
        (
            "jaxgpt attention --run-dir -x --prompt '--The end'",
            ["--run-dir=-x", "--prompt='--The end'"],
        ),
        ("train.py smoke --out-dir -x", ["--out-dir=-x"]),
        ("train.py --data.path text.txt -a.txt -b.txt", ["./-a.txt"]),
        ("train.py --out-dir --resume", []),
        ("generate.py --run-dir x --temprature=-1 --seed -1", []),
    ],
)
def test_a_value_that_begins_with_a_dash_is_an_error_that_says_how_to_write_it(
    call, capsys, tmp_path, monkeypatch, command, lines
):
    monkeypatch.chdir(tmp_path)
    Path("-a.txt").touch()
    with pytest.raises(SystemExit) as stopped:
        call(*shlex.split(command))
    assert stopped.value.code == 2
    found = re.findall(r"begins with a dash is written (.+)", capsys.readouterr().err)
    assert found == lines


@pytest.mark.parametrize("command", [["generate.py"], ["-m", "jaxgpt", "evaluate"]])
def test_an_error_is_one_line_and_the_status_1(tmp_path, command):
    out, err = finish(start_script(*command, "--run-dir", tmp_path), code=1)
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith(f"error: {tmp_path}")


@pytest.mark.parametrize("command", SERVES)
def test_a_run_of_another_kind_is_refused_with_its_kind(
    call, untrained, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    for kind in INSTEAD.keys() - SERVES[command]:
        with pytest.raises(ValueError, match=rf"\b{kind}\b") as refused:
            call(*shlex.split(command.format(untrained / kind)))
        assert "\n" not in str(refused.value)
        if command.split()[1] in ("--run-dir", "classify", "translate", "chat"):
            assert INSTEAD[kind] in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_only_a_language_model_generates(untrained, kind):
    with pytest.raises(ValueError, match=INSTEAD[kind]):
        generate(load_run(untrained / kind), "Lear")
