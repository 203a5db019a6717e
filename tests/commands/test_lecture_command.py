import json

import jax
import numpy as np
import pytest
from conftest import TINY, changed, finish, start_script, train_on
from matplotlib.image import imread

from jaxgpt.commands import lecture
from jaxgpt.commands.lecture import RUNGS, SCALED, Rung, train_seeds
from jaxgpt.models import build_model
from jaxgpt.parallel.feeding import stack_batches
from jaxgpt.parallel.mesh import make_mesh
from jaxgpt.presets import PRESETS
from jaxgpt.text.batches import training_source
from jaxgpt.text.corpus import Corpus, load_corpus
from jaxgpt.training.evaluation import compile_losses, evaluate_exactly
from jaxgpt.training.step import create_state


def test_the_ladder_is_the_lectures_presets_in_order():
    presets = [name for name in PRESETS if name.startswith("lecture-")]
    assert [rung.preset for rung in (*RUNGS, SCALED)] == presets


@pytest.fixture(scope="module")
def corpus():
    """Random tokens."""
    tokens = np.random.default_rng(0).integers(11, size=300).astype(np.uint16)
    return Corpus(tokens[:200], tokens[200:], None)


def test_seeds_that_train_at_once_train_as_each_alone(corpus):
    shape = {"architecture": "attention", "n_layer": 1, "dropout": 0.3}
    train = {"max_steps": 10, "eval_interval": 4, "checkpoint_interval": 4}
    config = changed(TINY, model=shape, train=train, mesh={"data": 1})
    model, seeds = build_model(config.model, "cpu"), [5, 2**32 - 1]
    mesh = make_mesh(config, lambda line: None)
    yielded = [
        (step, jax.device_get(params_S))
        for step, params_S in train_seeds(model, config, mesh, corpus, seeds)
    ]
    assert [step for step, _ in yielded] == [4, 8, 10]  # evaluations, and the end
    for index, seed in enumerate(seeds):
        alone = changed(config, train={"seed": seed})
        state = create_state(model, alone, mesh)
        batches = stack_batches(training_source(corpus.train, alone), range(10))
        state, _ = train_on(model, alone, mesh, state, batches)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b[index], atol=1e-5),  # noqa: B023
            state.params,
            yielded[-1][1],
        )


def test_a_loss_agrees_near_the_lectures_or_beside_pytorchs_seeds():
    def agreeing(*rung):
        losses = np.arange(1.805, 2.3, 0.01)
        return [f"{x:.3f}" for x in losses if Rung("x", *rung).agrees(x)]

    assert agreeing(2.0)[:: len(agreeing(2.0)) - 1] == ["1.975", "2.025"]
    band = agreeing(2.0, (2.1, 1.9))
    assert (band[0], band[-1], len(band)) == ("1.885", "2.115", 24)
    apart = agreeing(2.0, (2.2, 2.2))  # what lies between does not agree
    assert apart == [*agreeing(2.0), "2.185", "2.195", "2.205", "2.215"]


@pytest.fixture
def short_ladder(monkeypatch, tmp_path, call):
    """Climbs two rungs for 10 steps; returns lecture.json and stdout."""

    def climb(*rungs, status, flags=()):
        monkeypatch.setattr(lecture, "RUNGS", rungs)
        arguments = ["--steps-scale", 0.002, "--seeds", 7, 8, "--out-dir", tmp_path]
        out, err = call("jaxgpt", "lecture", *arguments, *flags, status=status)
        return json.loads((tmp_path / "lecture.json").read_text()), out, err

    return climb


def test_the_command_tells_and_writes_what_each_rung_came_to(short_ladder, tmp_path):
    rungs = (Rung("lecture-bigram", 4.6), Rung("lecture-single-head", 2.4))
    results, out, err = short_ladder(*rungs, status=1)
    assert results["seeds"] == [7, 8]
    bigram, head = results["rungs"]
    assert [bigram["rung"], head["rung"]] == [rung.preset for rung in rungs]
    assert (bigram["steps"], head["steps"]) == (6, 10)
    assert (bigram["passed"], head["passed"]) == (True, False)
    for result in (bigram, head):
        assert result["val_loss"] == pytest.approx(np.mean(result["val_losses"]))
        assert result["difference"] == result["val_loss"] - result["lecture"]
        assert result["curve"][-1]["val_losses"] == result["val_losses"]
        losses = [point["val_losses"] for point in result["curve"]]
        assert np.all(np.diff(losses, axis=0) < 0)  # they learn
        (row,) = [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in out.splitlines()
            if line.startswith(f"| {result['rung'].removeprefix('lecture-')} ")
        ]
        assert row[1] == f"{result['parameters']:,}"
        assert row[3:6] == [
            f"{result['val_loss']:.3f}",
            f"{result['lecture']:.2f}",
            f"{result['difference']:+.3f}",
        ]
        assert row[7] == ("pass" if result["passed"] else "FAIL")
        assert len(result["sample"]) == 300
        assert result["sample"].strip() in out
        assert f"{result['rung']}  step {result['steps']}/{result['steps']}" in err
    assert bigram["parameters"] == 4225
    assert imread(tmp_path / "lecture.png").std() > 0.01


def test_losses_are_exact_on_the_validation_split():
    config = changed(PRESETS["lecture-bigram"](), mesh={"data": 1})
    config = changed(config, train={"max_steps": 6, "steps_per_call": 1})
    corpus, config = load_corpus(config)
    model = build_model(config.model, "cpu")
    mesh = make_mesh(config, lambda line: None)
    ((_, params_S),) = train_seeds(model, config, mesh, corpus, [7])
    params = jax.tree.map(lambda leaf: leaf[0], params_S)
    losses = compile_losses(model, mesh)
    exact = evaluate_exactly(losses, params, corpus.val, config)
    result = lecture.climb(RUNGS[0], [7], steps_scale=0.002)
    assert result["val_losses"] == pytest.approx([exact.nats_per_token], abs=1e-5)


def test_the_status_is_zero_if_every_rung_agrees(short_ladder):
    results, _, _ = short_ladder(Rung("lecture-bigram", 4.6), status=0)
    assert all(rung["passed"] for rung in results["rungs"])


def test_scaled_adds_the_last_rung(short_ladder, monkeypatch):
    monkeypatch.setattr(lecture, "SCALED", Rung("lecture-multi-head", 2.28))
    rung = Rung("lecture-bigram", 4.6)
    results, _, _ = short_ladder(rung, flags=["--scaled"], status=1)
    assert [r["rung"] for r in results["rungs"]] == [rung.preset, "lecture-multi-head"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps-scale", 0], r"--steps-scale 0.0 must be above 0, up to 1"),
        (["--steps-scale", "nan"], r"--steps-scale nan must be above 0, up to 1"),
        (["--steps-scale", "inf"], r"--steps-scale inf must be above 0, up to 1"),
        (["--seeds"], r"--seeds \(\) must be one or more, all different"),
        (["--seeds", 7, 7], r"--seeds \(7, 7\) must be one or more, all different"),
        (["--seeds", -1], "seed=-1 must be from 0"),
    ],
)
def test_bad_input_is_an_error_that_names_it(call, flags, message):
    with pytest.raises(ValueError, match=message):
        call("jaxgpt", "lecture", *flags)


def test_a_trial_does_not_replace_the_real_ladder(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lecture, "RUNGS", RUNGS[:1])
    out, _ = call("jaxgpt", "lecture", "--steps-scale", 0.001, status=1)
    assert "a trial, with 0.001 of the lecture's steps" in out
    (results,) = tmp_path.rglob("lecture.json")
    assert results.parent == tmp_path / "runs" / "lecture-trial"


@pytest.mark.slow
def test_every_rung_but_the_scaled_one_agrees(tmp_path):
    process = start_script("-m", "jaxgpt", "lecture", "--out-dir", tmp_path)
    out, _ = finish(process, timeout=1800)
    assert out.count(" pass |") == len(RUNGS)
