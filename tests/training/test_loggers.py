import struct
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed
from tensorboardX.proto.event_pb2 import Event, SessionLog
from test_monitor import metrics_of, monitor_of

import train
from jaxgpt.training import loggers
from jaxgpt.training.monitor import read_rows

CONFIG = changed(TINY, train={"log_interval": 2, "log_to": ("tensorboard",)})


def log_rows(run_dir, config=CONFIG):
    """Logs steps 1 to 8, the initial evaluation and the end."""
    with monitor_of(run_dir, None, config) as monitor:
        monitor.eval(0, {"train_loss": 4.0, "val_loss": 4.5})
        for first in (0, 4):
            accuracy = [0.5, 0.25, jnp.nan, jnp.nan]
            monitor.train(first, metrics_of(4, accuracy=accuracy), 0)
        monitor.flush()
        monitor.done(8, {8: 2.25}, None)


def figures_of(run_dir):
    """The figures of metrics.jsonl that are not null, by step and name."""
    others = ("event", "step", "elapsed_seconds")
    return {
        (row["step"], f"{row['event']}/{name}"): pytest.approx(value)
        for row in read_rows(run_dir / "metrics.jsonl")
        for name, value in row.items()
        if name not in others and value is not None
    }


def events_of(run_dir):
    """The events of the only file in RUN_DIR/tensorboard."""
    (path,) = (run_dir / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:  # length, its checksum, event, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def shown_by_tensorboard(run_dir):
    values = [(e, value) for e in events_of(run_dir) for value in e.summary.value]
    shown = {(event.step, value.tag): value.simple_value for event, value in values}
    assert len(shown) == len(values)  # none twice
    return shown


def test_tensorboard_has_the_finite_figures_of_all_rows(tmp_path):
    log_rows(tmp_path)
    shown = shown_by_tensorboard(tmp_path)
    assert shown == figures_of(tmp_path)
    assert (2, "train/accuracy") in shown
    assert (4, "train/accuracy") not in shown
    names = {"train/learning_rate", "train/tokens_per_second", "eval/val_loss"}
    assert names | {"done/val_loss"} < {tag for _, tag in shown}


def test_a_resumed_run_has_the_rows_it_kept_and_none_after_the_restored_step(tmp_path):
    log_rows(tmp_path, changed(CONFIG, train={"log_to": ()}))  # kept all the same
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events.out.tfevents.1").touch()
    with monitor_of(tmp_path, 4, CONFIG):
        pass
    shown = shown_by_tensorboard(tmp_path)
    assert shown == figures_of(tmp_path)
    assert max(shown)[0] == 4
    start = events_of(tmp_path)[1]  # a TensorBoard that is open forgets what it read
    assert (start.step, start.session_log.status) == (0, SessionLog.START)
    times = [event.wall_time for event in events_of(tmp_path) if event.step]
    elapsed = [r["elapsed_seconds"] for r in read_rows(tmp_path / "metrics.jsonl")]
    np.testing.assert_allclose(np.diff(times), np.diff(elapsed[1:]), atol=1e-5)


def test_of_several_processes_only_the_first_logs(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxgpt.training.monitor.is_first_process", lambda: False)
    log_rows(tmp_path)
    assert not list(tmp_path.iterdir())


def test_wandb_goes_on_with_the_run_after_the_steps_it_has(tmp_path, monkeypatch):
    started, logged = [], []

    def init(**settings):
        started.append(settings)
        run = nullcontext()
        run.step = max((step for step, _ in logged), default=-1) + 1
        run.log = lambda values, step: logged.append((step, values))
        return run

    wandb = SimpleNamespace(init=init, Settings=dict, Error=RuntimeError)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = changed(CONFIG, train={"log_to": ("wandb",)})
    with monitor_of(tmp_path / "run", None, config) as monitor:
        monitor.eval(0, {"train_loss": 4.0, "val_loss": 4.5})
        monitor.train(0, metrics_of(4, loss=[3.0] * 4), 0)
        monitor.flush()
    with monitor_of(tmp_path / "run", 2, config) as monitor:
        monitor.train(2, metrics_of(6, loss=[3.0] * 2 + [2.0] * 4), 0)
        monitor.flush()
        monitor.done(8, {8: 2.25}, None)
    assert [step for step, _ in logged] == [0, 2, 4, 6, 8, 8]
    losses = [values["train/loss"] for _, values in logged[1:-1]]
    assert losses == [3.0, 3.0, 2.0, 2.0]
    assert logged[0][1] == {"eval/train_loss": 4.0, "eval/val_loss": 4.5}
    assert logged[-1][1]["done/val_loss"] == 2.25
    assert started[0] == started[1]  # with the id
    assert started[0]["name"] == "run"
    assert started[0]["config"] == config.to_dict()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_the_run_begins(tmp_path, monkeypatch, name):
    monkeypatch.setattr(loggers, "find_spec", lambda package: None)
    config = changed(CONFIG, train={"log_to": (name,)})
    with pytest.raises(ImportError, match=f"pip install {loggers.PACKAGES[name]}"):
        train.train(config, tmp_path / "run", resume=False, overwrite=False)
    assert not (tmp_path / "run").exists()
