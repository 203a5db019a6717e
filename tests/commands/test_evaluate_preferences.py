import json
import shutil

import numpy as np
import pytest
from conftest import examples_config

import train
from jaxgpt import load_run
from jaxgpt.commands.evaluate_preferences import preference_metrics
from jaxgpt.run import load_config
from jaxgpt.text.corpus import load_split
from jaxgpt.training.monitor import read_rows


def test_the_figures_of_known_rewards():
    margins = np.array([-1, 2, 3, 4, -5, 6, 7, 8.0])
    report = preference_metrics(np.stack([margins, 0 * margins], axis=1))
    assert (report["pairs"], report["accuracy"]) == (8, 0.75)
    assert report["accuracy_standard_error"] == (0.75 * 0.25 / 8) ** 0.5
    np.testing.assert_allclose(report["loss"], np.log1p(np.exp(-margins)).mean())
    assert report["margin"] == 3.0
    names = ("from", "to", "pairs", "accuracy")
    assert [[part[name] for name in names] for part in report["quartiles"]] == [
        [1, 2, 2, 0.5],
        [3, 4, 2, 1],
        [5, 6, 2, 0.5],
        [7, 8, 2, 1],
    ]
    assert len(preference_metrics(np.array([[1.0, 0]]))["quartiles"]) == 1


@pytest.fixture(scope="module", params=["reward", "dpo"])
def trained(request, tmp_path_factory):
    """The folder of a run in `run`, and its captured output."""
    folder = tmp_path_factory.mktemp(request.param)
    config = examples_config(folder, request.param)
    train.train(config, folder / "run", resume=False, overwrite=False)
    return folder


def test_evaluate_has_the_loss_that_training_reported(trained, call):
    *_, done = read_rows(trained / "run" / "metrics.jsonl")
    flags = "evaluate", "--run-dir", trained / "run", "--checkpoint", "latest"
    report = json.loads(call("jaxgpt", *flags, "--json").out)
    assert report["split"] == "val"
    np.testing.assert_allclose(report["loss"], done["val_loss"], rtol=1e-5)
    run = load_run(trained / "run")
    pairs = load_split(run.config, "val", str, run.tokenizer)
    assert report["pairs"] == len(pairs)
    assert sum(part["pairs"] for part in report["quartiles"]) == len(pairs)
    out = call("jaxgpt", *flags, "--data-path", trained / "preferences.jsonl").out
    assert "240" in out.split("pairs")[1]
    assert out.count("difference") == 4


def test_rows_have_accuracy_and_margin_and_the_run_is_shown(trained, capsys):
    *_, last, _ = (
        row
        for row in read_rows(trained / "run" / "metrics.jsonl")
        if row["event"] != "eval"
    )
    assert {"accuracy", "margin", "tokens_per_second"} <= last.keys()
    train.show_sample(load_run(trained / "run"))
    out = capsys.readouterr().out
    if load_config(trained / "run").dpo:
        assert out.strip()
    else:
        lines = [line.split("\t") for line in out.splitlines()]
        assert [line[0] for line in lines] == ["chosen", "rejected"] * 3
        assert {line[2] for line in lines} == {"aaa", "hg"}


@pytest.mark.parametrize("trained", ["dpo"], indirect=True)
def test_a_dpo_run_names_its_reference_and_refuses_another(trained, tmp_path):
    config = load_config(trained / "run")
    assert len(config.dpo.reference_sha256) == 64
    run_dir = shutil.copytree(trained / "run", tmp_path / "run")
    start, kept = trained / "start" / "checkpoints" / "8", tmp_path / "kept"
    shutil.move(start, kept)
    shutil.copytree(sorted((run_dir / "checkpoints").glob("[0-9]*"))[-1], start)
    try:
        with pytest.raises(ValueError, match=r"reference has changed .*sha256"):
            train.train(config, run_dir, resume=True, overwrite=False)
    finally:
        shutil.rmtree(start)
        shutil.move(kept, start)


def test_dpo_needs_a_run_to_start_from(tmp_path, call):
    (tmp_path / "a.jsonl").touch()
    flags = "--data.path", tmp_path / "a.jsonl", "--out-dir", tmp_path / "run"
    with pytest.raises(ValueError, match="--init-from"):
        call("train.py", "dpo", *flags)
