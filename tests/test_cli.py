import contextlib
import json
import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import TINY, changed, save_params

from jaxgpt import CharTokenizer, Config
from jaxgpt.cli import parse_arguments, read_options
from jaxgpt.parallel import processes
from jaxgpt.presets import PRESETS
from jaxgpt.run import load_config, save_config
from jaxgpt.training.checkpoint import open_checkpoints


def config_of(*argv):
    return parse_arguments(list(argv))[0]


@pytest.fixture
def run_dir(tmp_path):
    """A directory with a run that has not trained yet."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(folder, TINY, None)
    return folder


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"finetune-shakespeare"}))
def test_a_preset_trains_into_its_own_directory(preset):
    config, run_dir, _ = parse_arguments([preset])
    assert config == PRESETS[preset]()
    assert run_dir == Path("runs") / preset


def test_without_a_preset_the_one_for_the_device_is_taken_and_named(capsys):
    config, run_dir, _ = parse_arguments(["--train.max-steps", "7"])
    expected = PRESETS["shakespeare-char-cpu"]()
    assert config == changed(expected, train={"max_steps": 7})
    assert run_dir == Path("runs/shakespeare-char-cpu")
    assert "no preset given: shakespeare-char-cpu" in capsys.readouterr().err


def test_fields_are_overridden_and_the_rest_is_kept():
    argv = ["smoke", "--model.n-layer", "3", "--optimizer.learning-rate", "1e-2"]
    argv += ["--data.path", "a.txt", "b.txt", "--model.bias", "--train.seed=5"]
    assert config_of(*argv) == changed(
        PRESETS["smoke"](),
        model={"n_layer": 3, "bias": True},
        optimizer={"learning_rate": 1e-2},
        data={"path": ("a.txt", "b.txt")},
        train={"seed": 5},
    )


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean shakespeare-char"):
        parse_arguments(["shakespear-char"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.max-step", "3"], "--train.max-steps"),
        (["--model.n-layer", "four"], "invalid literal for int"),
        (["--model.gelu", "fast"], "('exact', 'tanh')"),
        (["--model.n-head", "3"], "n_embd=64 is not divisible by n_head=3"),
        (["--optimizer.beta1", "2"], "beta1=2.0 must be at least 0, under 1"),
        (["--out-dir"], "--out-dir"),
    ],
)
def test_a_bad_flag_exits_with_a_message(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["smoke", *argv])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


def test_help_explains_every_field_and_lists_the_presets(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    for preset in PRESETS:
        assert f"{preset}:" in text
    assert "--model.n-layer INT Transformer blocks (default: 4)" in text
    assert "--init-from {None}|PATH run to start from" in text
    for section in fields(Config):
        for setting in fields(getattr(Config(), section.name)):
            flag = f"--{section.name}.{setting.name.replace('_', '-')}"
            if setting.name == "init_from":  # --init-from fills it in
                assert flag not in text
                continue
            values_and_help = re.search(rf"{flag}\b(.*?)\(default", text)
            assert re.search(r"[a-z]+ [a-z]+", values_and_help[1]), flag


def test_a_resumed_run_keeps_its_config_but_for_overrides(run_dir):
    argv = ["--out-dir", str(run_dir), "--resume", "--train.max-steps", "99"]
    assert config_of(*argv) == changed(TINY, train={"max_steps": 99})


def test_an_override_that_changes_a_resumed_model_is_refused(run_dir):
    argv = ["--out-dir", str(run_dir), "--resume", "--model.n-layer", "3"]
    with pytest.raises(ValueError, match=r"--model\.n-layer 3 contradicts the run"):
        parse_arguments(argv)


def test_resuming_nothing_is_an_error_without_a_preset_to_start(tmp_path):
    argv = ["--out-dir", str(tmp_path / "none"), "--resume"]
    with pytest.raises(FileNotFoundError, match=r"no run in .* to resume"):
        parse_arguments(argv)
    assert config_of("smoke", *argv) == PRESETS["smoke"]()


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        parse_arguments(["smoke", "--resume", "--overwrite"])


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"model": {"x": 1}})])
def test_a_damaged_config_is_named(run_dir, content):
    (run_dir / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is not a config of jaxgpt"):
        parse_arguments(["--out-dir", str(run_dir), "--resume"])


def test_a_start_from_a_run_takes_its_model_and_tokenizer_and_the_presets_rest(
    tiny_run, capsys
):
    config = config_of("smoke", "--init-from", str(tiny_run), "--model.remat")
    base, smoke = load_config(tiny_run), PRESETS["smoke"]()
    assert smoke.model.dropout != base.model.dropout
    checkpoint = tiny_run.resolve() / "checkpoints" / "8"
    assert config == changed(
        smoke,
        model=vars(base.model) | {"dropout": smoke.model.dropout, "remat": True},
        data={"tokenizer": str(tiny_run.resolve() / "tokenizer.json")},
        train={"init_from": str(checkpoint)},
    )
    assert capsys.readouterr().err == f"starting from {checkpoint}\n"
    for which in ("latest", "8"):
        argv = ["smoke", "--init-from", str(tiny_run), "--checkpoint", which]
        assert config_of(*argv).train.init_from == str(checkpoint)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.n-layer", "3"], r"--model\.n-layer 3 contradicts the run"),
        (["--model.vocab-size", "12"], r"--model\.vocab-size 12 contradicts the run"),
        (["--data.tokenizer", "gpt2"], r"tokenizer gpt2 can't replace the run's own"),
        (["--model.block-size", "9"], "9 is more than the 8 positions"),
        (["--checkpoint", "7"], "checkpoint '7' is not one of: best, latest, 8"),
        (["--out-dir", "RUN"], "is the run to start from; give another --out-dir"),
        (["--resume"], "--resume goes on .* --init-from begins .*; choose one"),
    ],
)
def test_a_start_that_contradicts_the_run_is_refused(tiny_run, argv, message):
    argv = [str(tiny_run) if word == "RUN" else word for word in argv]
    with pytest.raises(ValueError, match=message):
        parse_arguments(["smoke", "--init-from", str(tiny_run), *argv])


def test_a_resumed_run_keeps_its_tokenizer(tiny_run):
    argv = ["--out-dir", str(tiny_run), "--resume", "--data.tokenizer", "gpt2"]
    with pytest.raises(ValueError, match="tokenizer gpt2 can't replace the run's own"):
        parse_arguments(argv)


def test_a_start_without_a_tokenizer_gets_none_by_chance(tiny_run, tmp_path, text_file):
    shutil.copytree(tiny_run, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").unlink()
    argv = ["smoke", "--init-from", str(tmp_path / "base")]
    with pytest.raises(
        ValueError, match=r"base has no tokenizer.* --data\.tokenizer it"
    ):
        parse_arguments([*argv, "--data.path", str(text_file)])
    assert config_of(*argv, "--data.path", str(tmp_path)).data.path == (str(tmp_path),)
    assert config_of(*argv, "--data.tokenizer", "gpt2").data.tokenizer == "gpt2"
    with pytest.raises(ValueError, match="bpe can't replace"):
        parse_arguments([*argv, "--data.tokenizer", "bpe"])


def test_a_start_needs_a_run(tmp_path, run_dir):
    with pytest.raises(
        FileNotFoundError, match=r"is not a run: it has no config\.json"
    ):
        parse_arguments(["smoke", "--init-from", str(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        parse_arguments(["smoke", "--init-from", str(run_dir)])
    with pytest.raises(ValueError, match="is one of --init-from's run; give that"):
        parse_arguments(["smoke", "--checkpoint", "latest"])


def test_the_fine_tuning_preset_starts_from_the_run_that_its_text_names(
    tiny_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"runs/gpt2 is not a run: .* import"):
        parse_arguments(["finetune-shakespeare"])
    shutil.copytree(tiny_run, tmp_path / "runs" / "gpt2")
    config, run_dir, _ = parse_arguments(["finetune-shakespeare"])
    assert run_dir == Path("runs/finetune-shakespeare")
    assert Path(config.train.init_from) == tmp_path / "runs/gpt2/checkpoints/8"
    assert config.model.n_embd == load_config(tiny_run).model.n_embd
    assert config.model.compute_dtype == "bfloat16"
    assert config.optimizer == PRESETS["finetune-shakespeare"]().optimizer
    other = config_of("finetune-shakespeare", "--init-from", str(tiny_run))
    assert Path(other.train.init_from) == tiny_run.resolve() / "checkpoints/8"


def test_a_start_from_a_run_that_reads_no_dropout_leaves_it_alone(tmp_path, bigram):
    model, params = bigram
    config = changed(TINY, model=vars(model.config))
    save_config(tmp_path, config, CharTokenizer("abcdefghijk"))
    with open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        save_params(checkpoints, 0, params)
    assert config_of("smoke", "--init-from", str(tmp_path)).model == model.config


def test_bpe_without_a_size_is_told_to_give_one():
    with pytest.raises(ValueError, match=r"as in --model\.vocab-size 1024"):
        parse_arguments(["smoke", "--data.tokenizer", "bpe"])


def test_a_preset_is_checked_before_other_processes_are_waited_for():
    with pytest.raises(ValueError, match="there is no preset 'smok'"):
        read_options(["smok", "--process-id", "1"])


@pytest.mark.parametrize("flag", ["--dry-run", "--help"])
def test_what_one_process_does_alone_waits_for_no_others(flag, call, monkeypatch):
    def wait(*ids):
        raise AssertionError("it waits")

    monkeypatch.setattr(processes, "join_processes", wait)
    with contextlib.suppress(SystemExit):  # after the help
        out, _ = call("train.py", "smoke", flag, "--model.vocab-size", "65")
        assert "FLOPs per step" in out
    with pytest.raises(AssertionError, match="it waits"):
        call("train.py", "smoke")
