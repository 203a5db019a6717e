import re
import shutil
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import TINY, changed, save_params

from jaxgpt import CharTokenizer, Config
from jaxgpt.cli import parse_arguments
from jaxgpt.parallel import processes
from jaxgpt.presets import PRESETS
from jaxgpt.run import load_config, save_config
from jaxgpt.training.checkpoint import open_checkpoints


def config_of(*argv):
    return parse_arguments(list(map(str, argv)))[0]


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"finetune-shakespeare"}))
def test_a_preset_trains_into_its_own_directory(preset):
    config, run_dir, _ = parse_arguments([preset])
    assert config == PRESETS[preset]()
    assert run_dir == Path("runs") / preset


def test_without_a_preset_the_devices_default_is_used_and_named(capsys):
    config, run_dir, _ = parse_arguments(["--train.max-steps", "7"])
    expected = PRESETS["shakespeare-char-cpu"]()
    assert config == changed(expected, train={"max_steps": 7})
    assert run_dir == Path("runs/shakespeare-char-cpu")
    assert "shakespeare-char-cpu" in capsys.readouterr().err


def test_flags_override_fields_of_the_preset():
    argv = ["smoke", "--model.n-layer", "3", "--optimizer.learning-rate", "1e-2"]
    argv += ["--data.path", "a.txt", "b.txt", "--model.bias", "--train.seed=5"]
    assert config_of(*argv) == changed(
        PRESETS["smoke"](),
        model={"n_layer": 3, "bias": True},
        optimizer={"learning_rate": 1e-2},
        data={"path": ("a.txt", "b.txt")},
        train={"seed": 5},
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.max-step", "3"], "--train.max-steps"),
        (["--optimizer.beta1", "2"], "beta1=2.0"),
    ],
)
def test_an_invalid_flag_exits_with_a_message_that_names_it(capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        parse_arguments(["smoke", *argv])
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())


@pytest.mark.parametrize("preset", ["", "ppo", "dpo"])
def test_the_help_explains_every_field_and_lists_the_presets(capsys, preset):
    config = PRESETS[preset]() if preset else Config()
    with pytest.raises(SystemExit, match="0"):
        parse_arguments([*preset.split(), "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    for preset in PRESETS:
        assert f" {preset}: " in text
    assert "--model.n-layer INT Transformer blocks (default: 4)" in text
    sections = [each.name for each in fields(Config) if getattr(config, each.name)]
    for section in sections:
        for setting in fields(getattr(config, section)):
            flag = f"--{section}.{setting.name.replace('_', '-')}"
            if setting.name in ("reward", "reward_model"):
                flag = flag.replace("ppo.", "")
            values_and_help = re.search(rf"{flag}\b(.*?)\(default", text)
            if setting.name == "init_from":  # --init-from fills it in
                assert not values_and_help
            else:
                assert re.search(r"[a-z]+ [a-z]+", values_and_help[1]), flag


def test_resuming_keeps_the_runs_config_or_starts_with_a_preset(tiny_run, tmp_path):
    flags = ["--train.max-steps", "99", "--model.vocab-size", "None"]
    config = config_of("--out-dir", tiny_run, "--resume", *flags)
    assert config == changed(load_config(tiny_run), train={"max_steps": 99})
    config = config_of("smoke", "--out-dir", tmp_path / "none", "--resume")
    assert config == PRESETS["smoke"]()


def test_init_from_takes_model_and_tokenizer_from_the_run_and_the_rest_from_the_preset(
    tiny_run, capsys
):
    config = config_of("smoke", "--init-from", tiny_run, "--model.remat")
    base, smoke = load_config(tiny_run), PRESETS["smoke"]()
    assert smoke.model.dropout != base.model.dropout
    checkpoint = str(tiny_run.resolve() / "checkpoints" / "8")
    assert config == changed(
        smoke,
        model=vars(base.model) | {"dropout": smoke.model.dropout, "remat": True},
        data={"tokenizer": str(tiny_run.resolve() / "tokenizer.json")},
        train={"init_from": checkpoint},
    )
    assert checkpoint in capsys.readouterr().err
    for which in ("latest", "8"):
        config = config_of("smoke", "--init-from", tiny_run, "--checkpoint", which)
        assert config.train.init_from == checkpoint


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        ("smoke --resume --overwrite", ValueError, "--resume and --overwrite"),
        ("--out-dir NEW --resume", FileNotFoundError, "new-run"),
        ("--out-dir RUN --resume --model.n-layer 3", ValueError, r"--model\.n-layer 3"),
        ("smoke --init-from RUN", FileNotFoundError, r"\d/checkpoints"),
        ("smoke --init-from TINY --model.vocab-size 12", ValueError, "vocab-size 12"),
        ("smoke --init-from TINY --model.block-size 9", ValueError, "block-size 9 .*8"),
        ("smoke --init-from TINY --data.tokenizer gpt2", ValueError, "tokenizer gpt2"),
    ],
)
def test_flags_that_contradict_each_other_or_a_run_are_an_error(
    tmp_path, tiny_run, argv, error, message
):
    save_config(tmp_path, TINY, None)  # a run that has not trained yet
    folders = {"RUN": tmp_path, "NEW": tmp_path / "new-run", "TINY": tiny_run}
    with pytest.raises(error, match=message):
        config_of(*(folders.get(word, word) for word in argv.split()))


def test_a_classifier_takes_the_encoder_of_a_run_and_its_own_head_and_dropout(
    tmp_path,
):
    model = {"architecture": "masked-lm", "bias": True, "gelu": "tanh", "dropout": 0.4}
    config = changed(TINY, model=model)
    save_config(tmp_path, config, CharTokenizer("abcdefghijk"))
    (tmp_path / "checkpoints" / "8").mkdir(parents=True)
    argv = ["sentiment", "--init-from", tmp_path, "--checkpoint", "8"]
    found = config_of(*argv, "--model.pooling", "first", "--model.block-size", "5")
    preset = PRESETS["sentiment"]()
    model = vars(config.model) | {"dropout": preset.model.dropout, "block_size": 5}
    del model["mask_prob"]
    own = {"architecture": "classifier", "pooling": "first"}
    assert found.model == changed(preset, model=model | own).model
    assert found.optimizer == preset.optimizer
    with pytest.raises(ValueError, match=r"--model\.n-embd 8"):
        config_of(*argv, "--model.n-embd", "8")
    for preset in ("smoke", "reverse"):
        with pytest.raises(ValueError, match="masked-lm"):
            config_of(preset, *argv[1:])


def test_a_model_without_tokenizer_needs_one_to_read_text(
    tiny_run, tmp_path, text_file
):
    base = shutil.copytree(tiny_run, tmp_path / "base")
    (base / "tokenizer.json").unlink()
    argv = ["smoke", "--init-from", base]
    with pytest.raises(ValueError, match=rf"{base} .*--data\.tokenizer"):
        config_of(*argv, "--data.path", text_file)
    with pytest.raises(ValueError, match=rf"{base} .*--data\.tokenizer"):
        config_of(*argv, "--data.path", tmp_path)  # a folder with a text file
    (tmp_path / "train.bin").touch()
    assert config_of(*argv, "--data.path", tmp_path).data.path == (str(tmp_path),)
    assert config_of(*argv, "--data.tokenizer", "gpt2").data.tokenizer == "gpt2"
    with pytest.raises(ValueError, match=r"--data\.tokenizer bpe"):
        config_of(*argv, "--data.tokenizer", "bpe")


def test_the_fine_tuning_preset_starts_from_the_run_in_runs_gpt2(
    tiny_run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"runs/gpt2 .* import"):
        parse_arguments(["finetune-shakespeare"])
    shutil.copytree(tiny_run, tmp_path / "runs" / "gpt2")
    config, run_dir, _ = parse_arguments(["finetune-shakespeare"])
    assert run_dir == Path("runs/finetune-shakespeare")
    assert Path(config.train.init_from) == tmp_path / "runs/gpt2/checkpoints/8"
    assert config.model.n_embd == load_config(tiny_run).model.n_embd
    assert config.model.compute_dtype == "bfloat16"
    assert config.optimizer == PRESETS["finetune-shakespeare"]().optimizer
    other = config_of("finetune-shakespeare", "--init-from", tiny_run)
    assert Path(other.train.init_from) == tiny_run.resolve() / "checkpoints/8"


def test_init_from_a_model_without_dropout_gives_it_none(tmp_path, bigram):
    model, params = bigram
    config = changed(TINY, model=vars(model.config))
    save_config(tmp_path, config, CharTokenizer("abcdefghijk"))
    with open_checkpoints(tmp_path / "checkpoints") as checkpoints:
        save_params(checkpoints, 0, params)
    assert config_of("smoke", "--init-from", tmp_path).model == model.config


def test_help_an_unknown_preset_and_a_dry_run_need_neither_processes_nor_a_corpus(
    call, fresh_cache, monkeypatch
):
    join = Mock(side_effect=AssertionError("it waits"))
    monkeypatch.setattr(processes, "join_processes", join)
    with pytest.raises(SystemExit, match="0"):
        call("train.py", "smoke", "--help")
    with pytest.raises(ValueError, match="'smok'"):
        call("train.py", "smok", "--process-id", "1")
    out, err = call("train.py", "--dry-run", "--train.max-steps", "100")
    assert "804,096" in out  # parameters of the default preset
    assert "warmup_steps=100 " in err  # a contradiction is told here too
    assert not fresh_cache.exists()
    with pytest.raises(AssertionError, match="it waits"):
        call("train.py", "smoke")
