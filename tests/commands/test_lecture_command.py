import json
import re
from functools import partial
from operator import itemgetter
from threading import Barrier, Event

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, changed, finish, mesh_of, start_script, train_on
from matplotlib.figure import Figure

from jaxgpt.commands import lecture
from jaxgpt.commands.lecture import RUNGS, SCALED, Rung, train_seeds
from jaxgpt.models import build_model
from jaxgpt.ops import cross_entropy
from jaxgpt.parallel.feeding import stack_batches
from jaxgpt.presets import PRESETS
from jaxgpt.text.batches import training_source
from jaxgpt.text.corpus import Corpus, load_corpus
from jaxgpt.training.step import create_state


def test_the_ladder_is_the_lectures_presets_in_order():
    presets = [name for name in PRESETS if name.startswith("lecture-")]
    assert [rung.preset for rung in (*RUNGS, SCALED)] == presets


@pytest.mark.slow
def test_seeds_that_train_at_once_train_as_each_alone():
    tokens = np.random.default_rng(0).integers(11, size=300).astype(np.uint16)
    corpus = Corpus(tokens[:200], tokens[200:], None)
    shape = {"architecture": "attention", "n_layer": 1, "dropout": 0.3}
    train = {"max_steps": 10, "eval_interval": 4, "checkpoint_interval": 4}
    config = changed(TINY, model=shape, train=train, mesh={"data": 1})
    model, mesh, seeds = (
        build_model(config.model, "cpu"),
        mesh_of(config),
        [5, 2**32 - 1],
    )
    steps, params = zip(*train_seeds(model, config, mesh, corpus, seeds), strict=True)
    assert steps == (4, 8, 10)  # evaluations, and the end
    for index, seed in enumerate(seeds):
        alone = changed(config, train={"seed": seed})
        state = create_state(model, alone, mesh)
        batches = stack_batches(training_source(corpus.train, alone), range(10))
        state, _ = train_on(model, alone, mesh, state, batches)
        jax.tree.map(
            partial(np.testing.assert_allclose, atol=1e-5),
            jax.tree.map(itemgetter(index), params[-1]),
            state.params,
        )


def test_a_loss_agrees_near_the_lectures_or_in_the_range_of_pytorchs_seeds():
    def agreeing(*rung):
        losses = np.arange(1.805, 2.3, 0.01)
        return [f"{x:.3f}" for x in losses if Rung("x", *rung).agrees(x)]

    near = agreeing(2.0)
    assert (near[0], near[-1], len(near)) == ("1.975", "2.025", 6)
    band = agreeing(2.0, (2.1, 1.9))
    assert (band[0], band[-1], len(band)) == ("1.885", "2.115", 24)
    apart = agreeing(2.0, (2.2, 2.2))  # what lies between does not agree
    assert apart == [*near, "2.185", "2.195", "2.205", "2.215"]


def test_a_rung_reports_exact_losses_its_curve_and_a_sample(monkeypatch, capsys):
    runs, generate = [], lecture.generate

    def noted(run, *arguments, **options):
        runs.append(run)
        return generate(run, *arguments, **options)

    monkeypatch.setattr(lecture, "generate", noted)
    device = jax.devices()[1]
    result = lecture.train_rung(Rung("lecture-bigram", 4.6), [7, 8], 0.002, device)
    (run,), losses = runs, result["val_losses"]
    assert jax.tree.leaves(run.params)[0].device == device
    val = load_corpus(run.config)[0].val[:].astype(np.int32)
    table_VV = run.params["table"]["embedding"]  # of the first seed
    exact = cross_entropy(table_VV[val[:-1]], val[1:]).mean()
    assert losses[0] == pytest.approx(float(exact), abs=1e-5)
    assert len(losses) == 2
    assert losses[0] != losses[1]
    assert result["val_loss"] == pytest.approx(np.mean(losses))
    assert result["difference"] == result["val_loss"] - 4.6
    assert result["passed"]
    assert (result["steps"], result["parameters"]) == (6, 65 * 65)
    assert result["curve"][-1] == {"step": 6, "val_losses": losses}
    curve = [point["val_losses"] for point in result["curve"]]
    assert np.all(np.diff(curve, axis=0) < 0)  # both seeds learn
    assert len(result["sample"]) == 300
    assert "step 6/6" in capsys.readouterr().err


def made_up(rung, seeds=(7, 8), steps_scale=1, device=None):
    """What `train_rung` would return for losses of 2.0 and 2.1."""
    curve = [{"step": n, "val_losses": [3.0 - n / 9, 3.1 - n / 9]} for n in (5, 9)]
    result = {"rung": rung.preset, "parameters": 4225, "steps": 9, "seconds": 1.0}
    result |= {"val_losses": [2.0, 2.1], "val_loss": 2.05, "lecture": rung.lecture}
    result |= {"difference": 2.05 - rung.lecture, "pytorch": [2.5, 2.4], "curve": curve}
    return result | {"passed": rung.agrees(2.05), "sample": f"{rung.preset} says"}


def test_rungs_train_at_the_same_time_each_on_its_own_device(monkeypatch):
    started, used = Barrier(3, timeout=1200), []

    def train_rung(*arguments):
        used.append((arguments[-1], jnp.zeros(()).device))
        started.wait()
        return made_up(*arguments)

    monkeypatch.setattr(lecture, "train_rung", train_rung)
    results = list(lecture.train_rungs(RUNGS[:3], (7, 8), 1))
    names = [rung.preset for rung in RUNGS[:3]]
    assert sorted(result["rung"] for result in results) == sorted(names)
    assert set(used) == {(device, device) for device in jax.devices()[:3]}


def test_an_error_in_a_rung_does_not_wait_for_the_others(monkeypatch):
    raised, finished = Event(), []

    def train_rung(rung, *_):
        if rung is RUNGS[0]:
            raise FloatingPointError("the loss is nan")
        finished.append(raised.wait(timeout=1200))

    monkeypatch.setattr(lecture, "train_rung", train_rung)
    with pytest.raises(FloatingPointError, match="nan"):
        list(lecture.train_rungs(RUNGS[:2], (7, 8), 1))
    assert not finished
    raised.set()


@pytest.mark.parametrize(
    ("figures", "flags", "status"),
    [([2.04], [], 0), ([2.04, 2.4], [], 1), ([2.04], ["--scaled"], 1)],
)
def test_the_command_prints_and_writes_the_result_of_each_rung(
    call, tmp_path, monkeypatch, figures, flags, status
):
    rungs = [Rung(f"lecture-{figure}", figure) for figure in figures]
    monkeypatch.setattr(lecture, "RUNGS", rungs)
    monkeypatch.setattr(lecture, "train_rung", made_up)
    flags = ["--seeds", 7, 8, "--out-dir", tmp_path, *flags]
    out, _ = call("jaxgpt", "lecture", *flags, status=status)
    results = json.loads((tmp_path / "lecture.json").read_text())
    expected = [made_up(rung) for rung in [*rungs, *[SCALED] * ("--scaled" in flags)]]
    assert results == {"seeds": [7, 8], "steps_scale": 1.0, "rungs": expected}
    for result in expected:  # docs/lecture.md shows the whole table
        name = result["rung"].removeprefix("lecture-")
        (row,) = re.findall(rf"^\s*\| {name} .*$", out, re.MULTILINE)
        assert ("pass" if result["passed"] else "FAIL") in row
        assert result["sample"] in out
    assert (tmp_path / "lecture.png").exists()


def test_the_plot_shows_each_rungs_mean_range_and_figure(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: drawn.append(figure)
    )
    lecture.plot([made_up(RUNGS[0])], [7, 8], tmp_path / "lecture.png")
    (axes,) = drawn[0].axes
    (mean, figure, _), (spread,) = axes.lines, axes.collections
    np.testing.assert_allclose(mean.get_xydata(), [[5, 3.05 - 5 / 9], [9, 2.05]])
    np.testing.assert_allclose(figure.get_xydata(), [[9, RUNGS[0].lecture]])
    corners = {tuple(np.round(xy, 3)) for xy in spread.get_paths()[0].vertices}
    assert corners == {(5, 2.444), (5, 2.544), (9, 2.0), (9, 2.1)}


@pytest.mark.slow
def test_a_trial_does_not_replace_the_real_ladder(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lecture, "RUNGS", RUNGS[:1])
    call("jaxgpt", "lecture", "--steps-scale", 0.001, status=1)
    (path,) = tmp_path.rglob("lecture.json")
    assert path.parent == tmp_path / "runs" / "lecture-trial"
    (result,) = json.loads(path.read_text())["rungs"]
    assert (result["steps"], len(result["val_losses"])) == (3, 3)


@pytest.mark.slow
def test_every_rung_but_the_scaled_one_agrees(tmp_path):
    process = start_script("-m", "jaxgpt", "lecture", "--out-dir", tmp_path)
    out, _ = finish(process, timeout=1800)
    assert out.count(" pass |") == len(RUNGS)
