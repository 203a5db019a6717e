import json
import re
import time
from types import SimpleNamespace
from unittest.mock import create_autospec

import jax.numpy as jnp
import matplotlib.image
import pytest
from conftest import TINY, changed, losses, terminal_as_stderr
from matplotlib.figure import Figure

from jaxgpt.training.monitor import Monitor, read_rows, rewind

CONFIG = changed(TINY, train={"log_interval": 2})
CLASSIFIER = changed(CONFIG, model={"architecture": "classifier"})
START = time.monotonic()
STEP_METRICS = ("loss", "learning_rate", "grad_norm")
TRAIN_ROW = dict.fromkeys((*STEP_METRICS, "tokens_per_second"), 1.0)


def metrics_of(count, **values):
    """Metrics of a dispatch of `count` steps; all values are 1 but those given."""
    metrics = dict.fromkeys(STEP_METRICS, jnp.ones(count))
    tokens = jnp.full(count, TINY.data.batch_size * TINY.model.block_size)
    metrics |= {"tokens": tokens, "skipped": jnp.zeros(count, int)}
    return metrics | {name: jnp.array(value) for name, value in values.items()}


def monitor_of(run_dir, resumed_step=None, config=CONFIG):
    return Monitor(run_dir, config, resumed_step, START)


def rows_of(run_dir, event):
    rows = read_rows(run_dir / "metrics.jsonl")
    return [row for row in rows if row["event"] == event]


def test_rows_have_the_fields_of_their_event_and_of_the_objective(tmp_path, capsys):
    with monitor_of(tmp_path) as monitor:
        monitor.eval(0, {"train_loss": 4.0, "val_loss": 4.5})
        monitor.train(0, metrics_of(3, accuracy=[0.0, 0.25, 0.0]), START)
        monitor.train(3, metrics_of(5, accuracy=[jnp.nan] * 5), START)  # of weight 0
        monitor.eval(8, {"train_loss": 2.0, "val_loss": 2.5, "val_accuracy": 0.5})
        monitor.done(8, {8: 2.25, 4: 2.125}, 4)
    rows = rows_of(tmp_path, "train")
    accuracies = {row["step"]: row["accuracy"] for row in rows}
    assert accuracies == {2: 0.25, 4: None, 6: None, 8: None}  # every log_interval
    fields = (*STEP_METRICS, "accuracy", "tokens_per_second", "elapsed_seconds")
    assert list(rows[0]) == ["event", "step", *fields]
    evals = rows_of(tmp_path, "eval")
    assert list(evals[0])[1:] == ["step", "train_loss", "val_loss", "elapsed_seconds"]
    assert evals[1]["val_accuracy"] == 0.5
    (done,) = rows_of(tmp_path, "done")
    assert (done["step"], done["val_loss"], done["best_val_loss"]) == (8, 2.25, 2.5)
    assert done["best_exact_val_loss"] == 2.125
    assert "val accuracy 0.5" in (err := capsys.readouterr().err)
    assert all(loss in err.splitlines()[-1] for loss in ("2.2500", "2.1250"))
    assert "skipped" not in err


def test_the_exact_evaluation_has_a_bar_of_its_own(tmp_path, monkeypatch):
    terminal = terminal_as_stderr(monkeypatch)
    with monitor_of(tmp_path) as monitor:
        monitor.show("evaluating")
        with monitor.last_evaluation("last step", 1000) as advance:
            advance(250)
    before, _, after = terminal.getvalue().partition("whole val split")
    assert "evaluating" in before
    assert "25%" in after
    assert "evaluating" not in after


def test_an_evaluation_shows_the_share_done_beside_the_steps(tmp_path, monkeypatch):
    terminal = terminal_as_stderr(monkeypatch)
    with monitor_of(tmp_path) as monitor:
        advance = monitor.evaluating(400)
        advance(100)
        advance(36)
    assert "step 0/" in terminal.getvalue()
    assert "34%" in terminal.getvalue()


def test_of_several_processes_only_the_first_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxgpt.training.monitor.is_first_process", lambda: False)
    monkeypatch.setattr("jaxgpt.terminal.is_first_process", lambda: False)
    with monitor_of(tmp_path) as monitor:
        monitor.train(0, metrics_of(8), START)
        monitor.eval(8, {"train_loss": 2.0, "val_loss": 2.5})
        with pytest.raises(FloatingPointError):  # but all check that losses are finite
            monitor.done(8, {8: float("nan")}, 8)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_the_loss_curve_shows_the_logged_losses_and_the_best(tmp_path, monkeypatch):
    savefig = create_autospec(Figure.savefig, side_effect=Figure.savefig)
    monkeypatch.setattr(Figure, "savefig", savefig)
    with monitor_of(tmp_path) as monitor:
        monitor.eval(0, {"train_loss": 4.0, "val_loss": 4.5})
        monitor.train(0, metrics_of(8, loss=jnp.arange(4, 0, -0.5)), START)
        monitor.eval(4, {"train_loss": 2.0, "val_loss": 2.5})
        monitor.eval(8, {"train_loss": 1.0, "val_loss": 3.5})
    assert matplotlib.image.imread(tmp_path / "loss.png").ndim == 3
    (axes,) = savefig.call_args.args[0].axes
    curves = [dict(map(tuple, line.get_xydata())) for line in axes.lines]
    evaluated = {0: 4.0, 4: 2.0, 8: 1.0}, {0: 4.5, 4: 2.5, 8: 3.5}
    assert curves == [losses(tmp_path), *evaluated]
    assert losses(tmp_path) == {2: 3.5, 4: 2.5, 6: 1.5, 8: 0.5}
    assert [text.xy for text in axes.texts] == [(4, 2.5)]
    assert "per token" in axes.get_ylabel()
    with monitor_of(tmp_path, config=CLASSIFIER) as monitor:
        monitor.eval(4, {"train_loss": 2.0, "val_loss": 2.5})
    assert "per example" in savefig.call_args.args[0].axes[0].get_ylabel()


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_non_finite_loss_stops_at_its_step_and_is_not_logged(tmp_path, loss):
    metrics = metrics_of(4, loss=[1, 1, loss, 1], skipped=[0, 0, 1, 1])
    with monitor_of(tmp_path) as monitor:
        monitor.train(4, metrics, START)
        with pytest.raises(FloatingPointError, match="at step 7"):
            monitor.flush()
    assert [row["step"] for row in rows_of(tmp_path, "train")] == [6]


def test_a_skipped_step_is_reported_and_logged_as_null(tmp_path, capsys):
    config = changed(CONFIG, train={"max_skipped_steps": 5})
    norms = [1, 1, 1, float("inf")]
    with monitor_of(tmp_path, config=config) as monitor:
        monitor.train(0, metrics_of(4, skipped=[2, 2, 2, 3], grad_norm=norms), START)
        monitor.eval(4, {"train_loss": 1.0, "val_loss": 1.0})
        monitor.done(4, {4: 1.0}, 4)
    err = capsys.readouterr().err
    assert "step 4 is skipped, 3 of at most 5: grad_norm is inf" in err
    assert "3 steps skipped" in err.splitlines()[-1]
    text = (tmp_path / "metrics.jsonl").read_text()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [(row["loss"], row["grad_norm"]) for row in rows[:2]] == [(1, 1), (1, None)]
    assert (tmp_path / "loss.png").exists()


def test_resuming_deletes_partial_lines_later_rows_and_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"event": event, "step": step, **TRAIN_ROW, "elapsed_seconds": 1.0}
        for event, step in [("train", 1), ("eval", 2), ("done", 2), ("train", 3)]
    ]
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([lines[0], "{torn", *lines[1:], '{"event": "tra']))
    assert rewind(path, 2) == rows[1]
    assert list(read_rows(path)) == rows[:2]


@pytest.mark.parametrize(
    "content", [b'[{"event": "train"}]\n3\nnull\n', b'{"a": 1}\n', b"\xff\0\n", b""]
)
def test_a_finished_run_can_be_resumed_without_valid_rows(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with monitor_of(tmp_path, resumed_step=8) as monitor:
        monitor.done(8, {8: 2.25}, None)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert (row["event"], row["best_val_loss"]) == ("done", 2.25)
    assert row["best_exact_val_loss"] is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    clock = SimpleNamespace(now=100.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("jaxgpt.training.monitor.time", clock)
    return clock


def test_tokens_per_second_count_weights_and_leave_out_compilation(tmp_path, clock):
    with Monitor(tmp_path, CONFIG, None, clock.now) as monitor:
        for first in (0, 4):
            clock.now += 1000  # of compilation
            started = clock.now
            clock.now += 0.5  # of the dispatch
            monitor.train(first, metrics_of(4, tokens=[64, 0, 32, 4]), started)
            monitor.flush()
    rates = [row["tokens_per_second"] for row in rows_of(tmp_path, "train")]
    assert rates == [pytest.approx(200)] * 4


def test_lines_of_steps_are_a_second_apart_but_every_row_is_kept(
    tmp_path, clock, capsys
):
    with Monitor(tmp_path, CONFIG, None, clock.now) as monitor:
        for first in range(0, 8, 2):
            monitor.train(first, metrics_of(2), clock.now)
            clock.now += 0.6
            monitor.flush()
    lines = re.findall(r"step (\d)/8", capsys.readouterr().err)
    assert lines == ["2", "6", "8"]  # the first, one a second later, the last
    assert [row["step"] for row in rows_of(tmp_path, "train")] == [2, 4, 6, 8]


def test_elapsed_seconds_accumulate_over_resumes(tmp_path, clock):
    row = {"event": "train", "step": 4, **TRAIN_ROW, "elapsed_seconds": 1000.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with Monitor(tmp_path, CONFIG, 4, clock.now) as monitor:
        clock.now += 7
        monitor.train(4, metrics_of(4), clock.now)
        clock.now += 0.5
        monitor.flush()
    assert rows_of(tmp_path, "train")[-1]["elapsed_seconds"] == 1007.5
