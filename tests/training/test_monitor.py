import json
import time

import jax.numpy as jnp
import matplotlib.image
import pytest
from conftest import TINY, changed

from jaxgpt.training.monitor import Monitor, read_rows, rewind

CONFIG = changed(TINY, train={"log_interval": 2})
OF_A_STEP = dict.fromkeys(("loss", "learning_rate", "grad_norm"), 1.0)
OF_A_STEP["tokens_per_second"] = 1.0


def steps(count, loss=1.0):
    """Metrics of a call's steps."""
    names = ("loss", "learning_rate", "grad_norm")
    values = {name: jnp.full(count, loss) for name in names}
    tokens = jnp.full(count, TINY.data.batch_size * TINY.model.block_size)
    return values | {"tokens": tokens, "skipped": jnp.zeros(count, int)}


def session(run_dir, resumed_step=None):
    return Monitor(run_dir, CONFIG, resumed_step, time.monotonic())


def rows_of(run_dir, event):
    rows = read_rows(run_dir / "metrics.jsonl")
    return [row for row in rows if row["event"] == event]


def test_rows_have_the_fields_of_their_event(tmp_path):
    with session(tmp_path) as monitor:
        monitor.eval(0, {"train_loss": 4.0, "val_loss": 4.5})
        monitor.train(0, steps(3), time.monotonic())
        monitor.train(3, steps(5), time.monotonic())
        monitor.eval(8, {"train_loss": 2.0, "val_loss": 2.5})
        monitor.done(8, 2.25)
    train = rows_of(tmp_path, "train")
    assert [row["step"] for row in train] == [2, 4, 6, 8]  # every log_interval
    assert list(train[0]) == [
        "event",
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "elapsed_seconds",
    ]
    evals = rows_of(tmp_path, "eval")
    assert list(evals[0])[1:] == ["step", "train_loss", "val_loss", "elapsed_seconds"]
    (done,) = rows_of(tmp_path, "done")
    assert (done["step"], done["val_loss"], done["best_val_loss"]) == (8, 2.25, 2.5)


def test_of_several_processes_only_the_first_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxgpt.training.monitor.is_first_process", lambda: False)
    monkeypatch.setattr("jaxgpt.files.is_first_process", lambda: False)
    with session(tmp_path) as monitor:
        monitor.train(0, steps(8), time.monotonic())
        monitor.eval(8, {"train_loss": 2.0, "val_loss": 2.5})
        with pytest.raises(FloatingPointError):  # but all stop at what is not finite
            monitor.done(8, float("nan"))
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_the_curve_is_a_picture(tmp_path):
    with session(tmp_path) as monitor:
        monitor.train(0, steps(8), time.monotonic())
        monitor.eval(8, {"train_loss": 2.0, "val_loss": 2.5})
    picture = matplotlib.image.imread(tmp_path / "loss.png")
    assert picture.std() > 0.01  # not a blank page


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_is_not_logged(tmp_path, loss):
    metrics = steps(4)
    metrics["loss"] = metrics["loss"].at[2].set(loss)
    metrics["skipped"] = metrics["skipped"].at[2:].set(1)
    with session(tmp_path) as monitor:
        monitor.train(4, metrics, time.monotonic())
        with pytest.raises(FloatingPointError, match="at step 7"):
            monitor.flush()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [6]


def test_a_step_that_may_be_skipped_is_told_of_and_logged_as_null(tmp_path, capsys):
    config = changed(CONFIG, train={"max_skipped_steps": 5})
    metrics = steps(4) | {"skipped": jnp.array([2, 2, 2, 3])}
    metrics["grad_norm"] = metrics["grad_norm"].at[3].set(float("inf"))
    with Monitor(tmp_path, config, None, time.monotonic()) as monitor:
        monitor.train(0, metrics, time.monotonic())
        monitor.eval(4, {"train_loss": 1.0, "val_loss": 1.0})
        monitor.done(4, 1.0)
    told = capsys.readouterr().err
    assert "step 4 is skipped, 3 of at most 5: grad_norm is inf" in told
    assert "on the whole split, 3 steps skipped" in told
    text = (tmp_path / "metrics.jsonl").read_text()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [(row["loss"], row["grad_norm"]) for row in rows[:2]] == [(1, 1), (1, None)]
    assert (tmp_path / "loss.png").exists()


def test_resuming_drops_a_torn_line_later_rows_and_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"event": event, "step": step, **values, "elapsed_seconds": 1.0}
        for event, step, values in [
            ("train", 1, OF_A_STEP),
            ("eval", 2, {"train_loss": 1.0, "val_loss": 1.0}),
            ("done", 2, {"val_loss": 1.0, "best_val_loss": 1.0}),
            ("train", 3, OF_A_STEP),
        ]
    ]
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([lines[0], "{torn", *lines[1:], '{"event": "tra']))
    assert rewind(path, 2) == rows[1]
    assert list(read_rows(path)) == rows[:2]


@pytest.mark.parametrize(
    "content", [b'[{"event": "train"}]\n3\nnull\n', b'{"a": 1}\n', b"\xff\0\n", b""]
)
def test_a_run_goes_on_whose_metrics_are_another_file(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with session(tmp_path, resumed_step=4) as monitor:
        monitor.eval(8, {"train_loss": 2.0, "val_loss": 2.5})
        monitor.done(8, 2.25)
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["event"] for row in rows] == ["eval", "done"]


def test_tokens_per_second_counts_what_counts_from_the_call_to_its_end(
    tmp_path, monkeypatch
):
    now = 100.0  # the machine's speed is none of the test's business
    monkeypatch.setattr("jaxgpt.training.monitor.time.monotonic", lambda: now)
    metrics = steps(4) | {"tokens": jnp.array([64, 0, 32, 4])}
    with session(tmp_path) as monitor:
        for first in (0, 4):
            now += 1000  # as compilation takes
            started = now
            now += 0.5  # as the call itself takes
            monitor.train(first, metrics, started)
            monitor.flush()
    rates = [row["tokens_per_second"] for row in rows_of(tmp_path, "train")]
    assert rates == [pytest.approx(200)] * 4


def test_figures_that_an_objective_reports_are_in_the_rows(tmp_path, capsys):
    metrics = steps(2) | {"accuracy": jnp.array([0.25, jnp.nan])}  # of nothing
    with session(tmp_path) as monitor:
        monitor.train(0, metrics, time.monotonic())
        monitor.eval(2, {"train_loss": 2.0, "val_loss": 2.5, "val_accuracy": 0.5})
    (row,) = rows_of(tmp_path, "train")
    assert list(row)[2:6] == ["loss", "learning_rate", "grad_norm", "accuracy"]
    assert row["accuracy"] is None
    assert rows_of(tmp_path, "eval")[0]["val_accuracy"] == 0.5
    told = capsys.readouterr().err
    assert "step 2: train loss 2.0000, val loss 2.5000, val accuracy 0.5000" in told
    assert "skipped" not in told


def test_a_finished_run_whose_rows_are_gone_can_still_end(tmp_path):
    with session(tmp_path) as monitor:
        monitor.done(8, 2.25)
    (done,) = rows_of(tmp_path, "done")
    assert done["best_val_loss"] == 2.25


def test_elapsed_seconds_accumulate_over_resumes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    row = {"event": "train", "step": 4, **OF_A_STEP, "elapsed_seconds": 1000.0}
    path.write_text(json.dumps(row) + "\n")
    with session(tmp_path, resumed_step=4) as monitor:
        monitor.train(4, steps(4), time.monotonic())
        monitor.flush()
    assert 1000 < rows_of(tmp_path, "train")[-1]["elapsed_seconds"] < 1100
