import re
import shlex

import pytest
from conftest import ROOT

from jaxgpt.cli import parse_arguments
from jaxgpt.presets import PRESETS

README, PRESETS_PAGE, SCALING = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/presets.md", "docs/scaling.md")
)
TRAIN = re.findall(r"python train\.py([^#`\n]*)", README + SCALING)


@pytest.mark.parametrize("flags", sorted(set(TRAIN)))
def test_every_train_command_is_understood(tiny_run, flags):
    argv = [flag for flag in shlex.split(flags) if flag != "DIR"]
    argv = [str(tiny_run) if flag == "runs/gpt2" else flag for flag in argv]
    if "--out-dir" in argv and "--resume" in argv:
        argv = [
            "smoke",
            "--resume",
        ]  # of a run that a reader has, and this test has not
    if "--help" in argv:
        with pytest.raises(SystemExit):
            parse_arguments(argv)
    else:
        parse_arguments(argv)


def test_every_preset_is_told():
    assert re.findall(r"^\| `([\w.-]+)` \|", PRESETS_PAGE, re.M) == list(PRESETS)


def test_the_python_example_runs(smoke, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(example.replace("runs/shakespeare-char-cpu", str(smoke[0])), names)
    assert len(capsys.readouterr().out) == 201
    assert names["logits_BTV"].shape == (1, 19, 65)
