import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from conftest import (
    EXAMPLE_KINDS,
    TEXT,
    TINY,
    changed,
    contents,
    conversations_config,
    examples_config,
    finish,
    losses,
    start_script,
)

import train
from jaxgpt import exits, load_run
from jaxgpt.parallel.defaults import steps_in_next_call
from jaxgpt.run import crop_block_size, find_checkpoint, load_config
from jaxgpt.start import cache_dir
from jaxgpt.text.conversations import CHAT_TOKENS
from jaxgpt.training import checkpoint
from jaxgpt.training.monitor import read_rows


def run(config, run_dir, *, resume=False, overwrite=False):
    """Trains in this process."""
    return train.train(config, run_dir, resume=resume, overwrite=overwrite)


def resume(run_dir, **sections):
    """Resumes with the run's config, but for the given fields."""
    return run(changed(load_config(run_dir), **sections), run_dir, resume=True)


def evals_of(run_dir):
    rows = read_rows(run_dir / "metrics.jsonl")
    return [row for row in rows if row["event"] == "eval"]


def assert_same_run(one_dir, other_dir):
    assert losses(one_dir) == losses(other_dir)
    one, other = (load_run(folder, "latest") for folder in (one_dir, other_dir))
    assert one.step == other.step
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_smoke_trains_logs_every_step_plots_and_samples(smoke):
    run_dir, out, err = smoke
    assert list(losses(run_dir)) == list(range(1, 101))
    first, _, last = evals = evals_of(run_dir)
    assert [row["step"] for row in evals] == [0, 50, 100]
    assert first["val_loss"] > 4.1
    assert last["val_loss"] < 3.0
    *_, done = read_rows(run_dir / "metrics.jsonl")
    assert done["event"] == "done"
    assert abs(done["val_loss"] - last["val_loss"]) < 0.1
    assert len(out) == 401  # the sample and a newline, nothing else
    assert "step 100/100" in err
    assert (run_dir / "loss.png").stat().st_size > 10_000


@pytest.mark.processes
@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU]
)
def test_a_script_stopped_by_a_signal_saves_and_says_how_to_resume(tmp_path, number):
    run_dir = tmp_path / "run"
    many = ("--out-dir", run_dir, "--train.max-steps", 10**6)
    process = start_script("train.py", "smoke", *many)
    while not re.match(r"step \d+/", process.stderr.readline()):
        assert process.poll() is None
    process.send_signal(number)
    _, err = finish(process, 128 + number)
    assert f"--out-dir {run_dir} --resume" in err
    stopped = load_run(run_dir, "latest").step
    assert list(losses(run_dir)) == list(range(1, stopped + 1))
    more = ("--out-dir", run_dir, "--resume", "--train.max-steps", stopped + 5)
    _, err = finish(start_script("train.py", *more))
    assert f"from step {stopped}\n" in err
    assert list(losses(run_dir)) == list(range(1, stopped + 6))


@pytest.fixture(scope="session")
def trained(make_once):
    """A run of 8 steps with dropout, in a folder with its text, `tales.txt`."""

    def make(folder):
        (folder / "tales.txt").write_text(TEXT)
        config = changed(
            TINY,
            model={"n_layer": 1, "vocab_size": None},
            data={"path": (str(folder / "tales.txt"),)},
            train={"log_interval": 1},
            mesh={"data": 1},
        )
        run(config, folder / "run")

    return make_once("trained_tales", make) / "run"


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of `trained`, to be changed."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def tales(trained):
    """The config of `trained`, before its first run."""
    return changed(load_config(trained), model={"vocab_size": None})


KINDS = [*EXAMPLE_KINDS, "conversations"]


@pytest.mark.parametrize(
    "architecture",
    ["gpt", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS)],
)
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(
    trained, tales, tmp_path, monkeypatch, architecture
):
    if architecture == "conversations":
        trained, tales = tmp_path / "whole", conversations_config(tmp_path)
        run(tales, trained)
    elif architecture != "gpt":
        trained, tales = tmp_path / "whole", examples_config(tmp_path, architecture)
        run(tales, trained)

    def raise_in_step_6(step, config):
        if step == 5:
            signal.raise_signal(signal.SIGTERM)
        return steps_in_next_call(step, config)

    run_dir = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "steps_in_next_call", raise_in_step_6)
        with exits.plain_errors():
            assert run(tales, run_dir) == signal.SIGTERM
    assert list(losses(run_dir)) == [1, 2, 3, 4, 5, 6]
    assert load_run(run_dir, "latest").step == 6
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "ste')  # as a kill may leave it
    assert resume(run_dir) == 0
    assert_same_run(run_dir, trained)


@pytest.mark.parametrize("left", [["lock"], ["lock", "config.json", "tokenizer.json"]])
def test_a_run_stopped_before_its_first_checkpoint_resumes_at_step_0(
    trained, tales, tmp_path, left
):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in left:
        shutil.copy(trained / name, run_dir)
    run(tales, run_dir, resume=True)
    assert_same_run(run_dir, trained)


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint_interval", "step"), [(100, 10), (1, 9)])
def test_non_finite_parameters_stop_a_run_name_a_layer_and_are_never_saved(
    run_dir, checkpoint_interval, step
):
    wild = {"learning_rate": 1e38, "warmup_steps": 0, "grad_clip": 0.0}
    often = {"checkpoint_interval": checkpoint_interval, "steps_per_call": 4}
    steps = {"max_steps": 12, "eval_interval": 12} | often
    message = rf"at step {step}; .* step 10 .* h\.0\.ln_1"
    with pytest.raises(FloatingPointError, match=message):
        resume(run_dir, optimizer=wild, train=steps)
    assert list(losses(run_dir)) == list(range(1, 10))
    kept = load_run(run_dir, "latest")
    assert kept.step == 8
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept.params))


@pytest.fixture
def bigram_tales(tales):
    """A config that compiles fast, for 8 steps."""
    return changed(tales, model={"architecture": "bigram"})


def test_overwriting_starts_anew_but_only_if_the_corpus_can_be_trained_on(
    run_dir, bigram_tales, tmp_path
):
    (tmp_path / "empty.txt").write_text("")
    empty = changed(bigram_tales, data={"path": (str(tmp_path / "empty.txt"),)})
    before = contents(run_dir)
    with pytest.raises(ValueError, match=r"empty\.txt"):
        run(empty, run_dir, overwrite=True)
    assert contents(run_dir) | {"lock": b""} == before | {"lock": b""}
    run(changed(bigram_tales, train={"max_steps": 4}), run_dir, overwrite=True)
    assert list(losses(run_dir)) == [1, 2, 3, 4]
    assert load_run(run_dir, "latest").step == 4


@pytest.mark.slow
def test_a_loss_of_0_is_logged_and_ranks_as_the_best(bigram_tales, tmp_path):
    (tmp_path / "a.txt").write_text("a" * 200)
    data = {"path": (str(tmp_path / "a.txt"),), "sha256": ""}
    run(changed(bigram_tales, data=data), tmp_path / "run")
    assert losses(tmp_path / "run") == dict.fromkeys(range(1, 9), 0.0)
    assert checkpoint.best_metric(tmp_path / "run" / "checkpoints") == 0.0


def test_rows_are_on_disk_before_their_checkpoint_is_saved(
    bigram_tales, tmp_path, monkeypatch
):
    saved = []

    def save(checkpoints, state, metric):
        saved.append((int(state.step), list(losses(tmp_path / "run"))[-1]))

    monkeypatch.setattr(checkpoint, "save_state", save)
    intervals = {"eval_interval": 8, "checkpoint_interval": 2}
    run(changed(bigram_tales, train=intervals), tmp_path / "run")
    assert saved == [(2, 2), (4, 4), (6, 6), (8, 8)]


def test_the_end_has_the_exact_losses_of_the_last_step_and_of_the_best_checkpoint(
    bigram_tales, tmp_path, monkeypatch, call
):
    run_dir, save_state = tmp_path / "run", checkpoint.save_state
    monkeypatch.setattr(  # so that the first is the best
        checkpoint,
        "save_state",
        lambda checkpoints, state, metric: save_state(
            checkpoints, state, float(state.step)
        ),
    )

    def done():
        *_, row = read_rows(run_dir / "metrics.jsonl")
        return row["val_loss"], row["best_exact_val_loss"]

    def evaluated(checkpoint):
        flags = ("--run-dir", run_dir, "--checkpoint", checkpoint, "--json")
        return json.loads(call("jaxgpt", "evaluate", *flags).out)["nats_per_token"]

    run(changed(bigram_tales, train={"eval_interval": 4}), run_dir)
    last, best = evaluated("latest"), evaluated("best")
    assert done() == (pytest.approx(last, abs=1e-6), pytest.approx(best, abs=1e-6))
    assert abs(best - last) > 1e-4
    (run_dir / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("")
    resume(run_dir)  # the best that can be restored is now the last
    assert done() == (pytest.approx(last, abs=1e-6),) * 2
    restore = checkpoint.restore_state

    def fail(folder, which, *arguments, **options):
        if which == "best":
            raise ValueError("damaged")
        return restore(folder, which, *arguments, **options)

    monkeypatch.setattr(checkpoint, "restore_state", fail)
    assert resume(run_dir) == 0
    assert done() == (pytest.approx(last, abs=1e-6), None)


@pytest.mark.slow
def test_a_bpe_run_resumes_with_its_own_tokenizer(bigram_tales, fresh_cache, tmp_path):
    sections = {"model": {"vocab_size": 280}, "data": {"tokenizer": "bpe"}}
    run(changed(bigram_tales, train={"max_steps": 1}, **sections), tmp_path / "run")
    first = load_run(tmp_path / "run")
    assert first.tokenizer.vocab_size == 280
    shutil.rmtree(cache_dir() / "tokenizers")
    resume(tmp_path / "run", train={"max_steps": 2})
    again = load_run(tmp_path / "run", "latest")
    assert again.step == 2
    assert again.tokenizer.to_json() == first.tokenizer.to_json()
    assert not (cache_dir() / "tokenizers").exists()


@pytest.fixture
def fine_tuning(run_dir, tmp_path):
    """A config that trains the run's parameters on text with fewer characters."""
    (tmp_path / "other.txt").write_text(TEXT[::-1].replace("J", "").replace("R", ""))
    start = {"init_from": str(find_checkpoint(run_dir, "best")), "max_steps": 4}
    data = {"path": (str(tmp_path / "other.txt"),), "sha256": ""}
    data["tokenizer"] = str(run_dir / "tokenizer.json")
    return changed(load_config(run_dir), data=data, train=start)


@pytest.mark.slow
def test_fine_tuning_starts_from_a_runs_parameters_cropped_to_the_block_size(
    run_dir, fine_tuning, tmp_path
):
    frozen = {"learning_rate": 1e-30, "min_lr": 0.0}
    config = changed(fine_tuning, model={"block_size": 5}, optimizer=frozen)
    run(config, tmp_path / "tuned")
    base, tuned = load_run(run_dir), load_run(tmp_path / "tuned", "latest")
    assert tuned.step == 4
    assert tuned.tokenizer.characters == base.tokenizer.characters
    params = crop_block_size(base.params, 5)
    jax.tree.map(np.testing.assert_array_equal, tuned.params, params)
    tokens = base.tokenizer.encode("Puck ")[None]
    ours, theirs = (r.model.apply({"params": r.params}, tokens) for r in (tuned, base))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.slow
def test_a_fine_tuned_run_resumes_and_needs_its_base_only_before_a_checkpoint(
    run_dir, fine_tuning, tmp_path
):
    tuned, stopped = tmp_path / "tuned", tmp_path / "stopped"
    run(fine_tuning, tuned)
    first, last = (evals_of(tuned)[i]["val_loss"] for i in (0, -1))
    assert last < first
    shutil.copytree(tuned, stopped)
    shutil.rmtree(stopped / "checkpoints")
    resume(stopped)
    assert_same_run(stopped, tuned)
    shutil.rmtree(run_dir)
    assert resume(tuned) == 0


@pytest.mark.slow
def test_a_text_run_learns_conversations_then_others_with_the_same_tokens(
    run_dir, tmp_path, call
):
    """Through the command line: a text run, SFT, its resumption, a second SFT."""
    for name in ("first", "second"):
        conversations_config(tmp_path, name, size=1)

    def flags(start, name):
        shape = "--data.packing", "conversations", "--train.max-steps", "4"
        path = "--data.path", tmp_path / f"{name}.jsonl", "--out-dir", tmp_path / name
        return "train.py", "smoke", "--init-from", start, *path, *shape

    base = load_run(run_dir)
    err = call(*flags(run_dir, "first")).err
    assert f"python -m jaxgpt chat --run-dir {tmp_path / 'first'}" in err
    first = load_run(tmp_path / "first", "latest")
    assert first.tokenizer.special == CHAT_TOKENS
    assert first.config.model.vocab_size == base.tokenizer.vocab_size + 5
    resume(tmp_path / "first", train={"max_steps": 6})
    assert load_run(tmp_path / "first", "latest").step == 6
    err = call(*flags(tmp_path / "first", "second")).err
    assert "mean row" not in err
    second = load_run(tmp_path / "second", "latest")
    assert second.tokenizer.to_json() == first.tokenizer.to_json()
