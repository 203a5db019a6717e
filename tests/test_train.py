import re
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import TEXT, TINY, changed, finish, start_script

import train
from jaxgpt import generate, load_run
from jaxgpt.run import find_checkpoint
from jaxgpt.start import cache_dir
from jaxgpt.training import checkpoint
from jaxgpt.training.monitor import read_rows


def run(config, run_dir, *, resume=False, overwrite=False):
    """Trains in this process."""
    return train.train(config, run_dir, resume=resume, overwrite=overwrite)


def losses(run_dir):
    rows = read_rows(run_dir / "metrics.jsonl")
    found = [(r["step"], r["loss"]) for r in rows if r["event"] == "train"]
    assert found
    return found


def assert_same_parameters(one_dir, other_dir):
    one, other = (load_run(folder, "latest") for folder in (one_dir, other_dir))
    assert one.step == other.step
    for a, b in zip(
        *(jax.tree.leaves(run.params) for run in (one, other)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_smoke_trains_logs_every_step_draws_and_samples(smoke):
    run_dir, out, err = smoke
    rows = list(read_rows(run_dir / "metrics.jsonl"))
    assert [step for step, _ in losses(run_dir)] == list(range(1, 101))
    evals = [row for row in rows if row["event"] == "eval"]
    assert [row["step"] for row in evals] == [0, 50, 100]
    assert evals[0]["val_loss"] > 4.1
    assert evals[2]["val_loss"] < 3.0
    assert rows[-1]["event"] == "done"
    assert abs(rows[-1]["val_loss"] - evals[2]["val_loss"]) < 0.1
    assert len(out) == 401  # the sample and a newline, nothing else
    assert "step 100/100" in err
    assert (run_dir / "loss.png").stat().st_size > 10_000


def test_a_run_stopped_by_ctrl_c_resumes_bit_for_bit(smoke, tmp_path):
    run_dir = tmp_path / "run"
    process = start_script("train.py", "smoke", "--out-dir", run_dir)
    while not process.stderr.readline().startswith("step 20/"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = finish(process, 130)
    assert f"--out-dir {run_dir} --resume" in err
    stopped = load_run(run_dir, "latest").step
    assert 20 <= stopped < 100
    assert len(losses(run_dir)) == stopped
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "ste')  # as a kill may leave it
    _, err = finish(start_script("train.py", "--out-dir", run_dir, "--resume"))
    assert f"from step {stopped}" in err
    assert losses(run_dir) == losses(smoke[0])
    assert_same_parameters(run_dir, smoke[0])


def test_sigterm_saves_and_exits_with_its_number(tmp_path):
    process = start_script("train.py", "smoke", "--out-dir", tmp_path / "run")
    while not process.stderr.readline().startswith("step 20/"):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    finish(process, 128 + signal.SIGTERM)
    assert load_run(tmp_path / "run", "latest").step >= 20


def test_a_dry_run_needs_no_corpus_and_picks_the_preset_for_the_device(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "cache"))
    out, err = finish(start_script("train.py", "--dry-run"))
    assert "no preset given: shakespeare-char-cpu" in err
    assert "parameters         804,096" in out
    assert re.search(r"temporary memory   [\d.]+ MiB per device", out)
    assert not list(tmp_path.glob("cache/t*"))  # no text, no tokens


@pytest.fixture
def tales(text_file):
    """A config that trains on the small text in a second, in this process."""
    often = {"checkpoint_interval": 4, "log_interval": 1}
    config = changed(TINY, model={"vocab_size": None}, train=often)
    return changed(config, data={"path": (str(text_file),)})


def test_training_again_needs_a_word_and_then_starts_afresh(tales, tmp_path):
    run_dir = tmp_path / "run"
    assert run(tales, run_dir) == 0
    first = losses(run_dir)
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(tales, run_dir)
    assert losses(run_dir) == first
    other = changed(tales, train={"max_steps": 4})
    run(other, run_dir, overwrite=True)
    assert load_run(run_dir, "latest").step == 4


def test_a_resumed_run_may_go_on_for_longer(tales, tmp_path):
    run_dir = tmp_path / "run"
    run(tales, run_dir)
    longer = changed(load_run(run_dir).config, train={"max_steps": 12})
    run(longer, run_dir, resume=True)
    rows = list(read_rows(run_dir / "metrics.jsonl"))
    steps = [row["step"] for row in rows if row["event"] == "eval"]
    assert steps == [0, 4, 8, 12]
    assert [row["event"] for row in rows].count("done") == 1


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    tales, tmp_path
):
    run_dir = tmp_path / "run"
    run(changed(tales, train={"max_steps": 4}), run_dir)
    wild = {"learning_rate": 1e38, "warmup_steps": 0, "grad_clip": 0.0}
    config = changed(load_run(run_dir).config, optimizer=wild, train={"max_steps": 12})
    with pytest.raises(FloatingPointError, match=r"at step [67]"):
        run(config, run_dir, resume=True)
    kept = load_run(run_dir, "latest")
    assert kept.step == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept.params))


def test_parameters_that_give_no_loss_are_never_saved(tales, tmp_path):
    run_dir = tmp_path / "run"
    run(changed(tales, train={"max_steps": 4}), run_dir)
    config = changed(
        load_run(run_dir).config,
        optimizer={"learning_rate": 1e38, "warmup_steps": 0, "grad_clip": 0.0},
        train={"max_steps": 12, "checkpoint_interval": 1, "eval_interval": 12},
    )
    with pytest.raises(FloatingPointError, match="at step 5"):
        run(config, run_dir, resume=True)
    assert load_run(run_dir, "latest").step == 4


def test_a_loss_of_zero_is_a_loss(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a" * 200)
    config = changed(
        TINY,
        model={"vocab_size": None},
        data={"path": (str(path),)},
        train={"checkpoint_interval": 100},
    )
    run(config, tmp_path / "run")
    assert load_run(tmp_path / "run").step == 8


def test_input_that_cannot_be_trained_on_replaces_no_run(tales, tmp_path):
    run_dir = tmp_path / "run"
    run(tales, run_dir)
    (tmp_path / "empty.txt").write_text("")
    empty = changed(tales, data={"path": (str(tmp_path / "empty.txt"),)})
    with pytest.raises(ValueError, match="the corpus is empty"):
        run(empty, run_dir, overwrite=True)
    assert load_run(run_dir).step == 8


def test_fewer_steps_than_made_are_refused(tales, tmp_path):
    run(tales, tmp_path / "run")
    fewer = changed(load_run(tmp_path / "run").config, train={"max_steps": 4})
    with pytest.raises(ValueError, match="max_steps=4, but the run has made 8"):
        run(fewer, tmp_path / "run", resume=True)
    assert load_run(tmp_path / "run").config.train.max_steps == 8


def test_rows_are_on_disk_before_their_checkpoint_is_saved(
    tales, tmp_path, monkeypatch
):
    saved = []

    def save(checkpoints, state, figure):
        saved.append((int(state.step), losses(tmp_path / "run")[-1][0]))

    monkeypatch.setattr(checkpoint, "save_state", save)
    train_config = {"log_interval": 1, "eval_interval": 8, "checkpoint_interval": 2}
    run(changed(tales, train=train_config), tmp_path / "run")
    assert saved == [(2, 2), (4, 4), (6, 6), (8, 8)]


def test_a_run_stopped_before_its_first_checkpoint_starts_at_step_0(tales, tmp_path):
    run_dir = tmp_path / "run"
    reference_dir = tmp_path / "reference"
    run(tales, reference_dir)
    run(tales, run_dir)
    for path in (run_dir / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)
    run(load_run(reference_dir).config, run_dir, resume=True)
    assert losses(run_dir) == losses(reference_dir)


def test_a_run_stopped_before_its_config_was_saved_starts_at_step_0(tales, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    run(tales, tmp_path / "run", resume=True)
    assert load_run(tmp_path / "run", "latest").step == 8


def test_the_corpus_of_a_resumed_run_must_be_the_same(tales, text_file, tmp_path):
    run_dir = tmp_path / "run"
    run(tales, run_dir)
    config = load_run(run_dir).config
    text_file.write_text(TEXT[::-1])
    with pytest.raises(ValueError, match="the corpus has changed"):
        run(config, run_dir, resume=True)


@pytest.fixture
def start(tmp_path, tales):
    """A run to start from, and a config that does, of other text."""
    run(tales, tmp_path / "base")
    text = tmp_path / "other.txt"
    text.write_text(TEXT[::-1].replace("J", "").replace("R", ""))
    checkpoint = find_checkpoint(tmp_path / "base", "best")
    config = changed(
        load_run(tmp_path / "base").config,
        data={
            "path": (str(text),),
            "tokenizer": str(tmp_path / "base" / "tokenizer.json"),
            "sha256": "",
        },
        train={"init_from": str(checkpoint), "max_steps": 4},
    )
    return load_run(tmp_path / "base"), config


def test_training_starts_from_a_runs_parameters_with_its_tokenizer(start, tmp_path):
    base, config = start
    still = changed(config, optimizer={"learning_rate": 1e-30, "min_lr": 0.0})
    run(still, tmp_path / "still")
    after = load_run(tmp_path / "still", "latest")
    for a, b in zip(*map(jax.tree.leaves, (base.params, after.params)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert after.step == 4
    assert after.tokenizer.characters == base.tokenizer.characters
    run(config, tmp_path / "tuned")
    tuned = [
        row["val_loss"]
        for row in read_rows(tmp_path / "tuned" / "metrics.jsonl")
        if row["event"] == "eval"
    ]
    assert tuned[-1] < tuned[0]


def test_fewer_positions_are_the_first_ones(start, tmp_path):
    base, config = start
    config = changed(
        config,
        model={"block_size": 5},
        optimizer={"learning_rate": 1e-30, "min_lr": 0.0},
    )
    run(config, tmp_path / "short")
    short = load_run(tmp_path / "short")
    tokens = base.tokenizer.encode("Puck ")[None]
    ours, theirs = (r.model.apply({"params": r.params}, tokens) for r in (short, base))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert short.params["wpe"]["embedding"].shape == (5, 16)


def test_a_tuned_run_needs_its_start_no_more_once_it_has_a_checkpoint(start, tmp_path):
    _, config = start
    run(config, tmp_path / "tuned")
    (tmp_path / "base").rename(tmp_path / "gone")
    longer = changed(load_run(tmp_path / "tuned").config, train={"max_steps": 6})
    run(longer, tmp_path / "tuned", resume=True)
    assert load_run(tmp_path / "tuned", "latest").step == 6


def test_a_tuning_stopped_before_its_first_checkpoint_starts_from_the_run_again(
    start, tmp_path
):
    _, config = start
    for name in ("reference", "stopped"):
        run(config, tmp_path / name)
    shutil.rmtree(tmp_path / "stopped" / "checkpoints")
    run(load_run(tmp_path / "reference").config, tmp_path / "stopped", resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "reference")


def test_text_that_the_runs_tokenizer_lacks_is_named(start, tmp_path):
    _, config = start
    (tmp_path / "other.txt").write_text(TEXT + "Ω")
    with pytest.raises(
        ValueError, match=r"other\.txt: characters 'Ω' are not in the vocabulary"
    ):
        run(config, tmp_path / "tuned")


def test_a_run_of_bpe_resumes_with_its_own_tokenizer(tales, fresh_cache, tmp_path):
    config = changed(tales, model={"vocab_size": 280}, data={"tokenizer": "bpe"})
    run(changed(config, train={"max_steps": 4}), tmp_path / "run")
    first = load_run(tmp_path / "run")
    assert first.tokenizer.vocab_size == 280
    shutil.rmtree(cache_dir() / "tokenizers")
    run(changed(first.config, train={"max_steps": 8}), tmp_path / "run", resume=True)
    again = load_run(tmp_path / "run", "latest")
    assert again.step == 8
    assert again.tokenizer.to_json() == first.tokenizer.to_json()
    assert not (cache_dir() / "tokenizers").exists()
    assert len(generate(again, "Romeo é", max_new_tokens=9)[0]) >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smoke", "--data.path", "/nowhere"], "/nowhere is not a file"),
        (["smok"], "there is no preset 'smok'; did you mean smoke?"),
    ],
)
def test_an_error_is_one_line_and_no_traceback(arguments, message):
    _, err = finish(start_script("train.py", *arguments), code=1)
    (line,) = err.splitlines()
    assert line.startswith(f"error: {message}")
