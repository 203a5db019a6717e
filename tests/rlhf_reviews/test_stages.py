"""The whole experiment in small, killed and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, contents, finish, start_script

from jaxgpt.commands import rlhf_reviews
from jaxgpt.rlhf_reviews import stages
from jaxgpt.rlhf_reviews.arms import TINY
from jaxgpt.rlhf_reviews.data import read_lines
from jaxgpt.rlhf_reviews.stages import read_times

GOOD, BAD = ["superb", "lovely", "moving", "great"], ["awful", "boring", "weak", "dull"]
OTHERS = ["the", "film", "story", "actor", "plot", "scene", "a", "was", "with", "of"]


def write_reviews(path):
    """Random words, of which one in four says whether the review is positive."""
    rng, lines = random.Random(0), []
    for n in range(600):
        words = [
            rng.choice((BAD, GOOD)[n % 2] if rng.random() < 0.25 else OTHERS)
            + rng.choice(["", "", "", "", "", "", ".", "!"])
            for _ in range(rng.randint(30, 60))
        ]
        row = {"text": " ".join(words), "label": n % 2, "source": "imdb"}
        lines.append(f"{json.dumps(row)}\n")
    path.write_text("".join(lines))


def test_other_settings_are_refused(tmp_path):
    settings = json.loads(json.dumps(TINY.to_dict()))
    path = tmp_path / "settings.json"
    rlhf_reviews._check_settings(path, settings)
    rlhf_reviews._check_settings(path, settings)
    with pytest.raises(ValueError, match=r"other settings \(pairs\).*--out-dir"):
        rlhf_reviews._check_settings(path, settings | {"pairs": 3})


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,)])
def test_seeds_that_cannot_be_trained_with_are_refused(seeds, tmp_path):
    with pytest.raises(ValueError, match="seed"):
        rlhf_reviews.rlhf_reviews(tmp_path, seeds=seeds, scale="tiny")
    assert not contents(tmp_path)


def test_stages_run_once_with_beta_0_last_in_any_folder(tmp_path, monkeypatch):
    commands, out = {}, tmp_path / "with a space"
    out.mkdir()

    def train(run_dir, arguments):
        commands[run_dir.relative_to(out).as_posix()] = arguments

    monkeypatch.setattr(stages, "_train", train)
    monkeypatch.setattr(stages, "_in_process", lambda *_: None)
    monkeypatch.setattr(stages, "write_data", lambda *_: None)
    arms = [*TINY.arms]
    stages.run_experiment(out, TINY, tmp_path, (1, 2), arms)
    assert [*commands][-2:] == ["seed-1/beta-0", "seed-2/beta-0"]
    for seed in ("seed-1", "seed-2"):
        assert all(f"{seed}/{arm}" in commands for arm in ("reward", *arms))
        ppo = commands[f"{seed}/ppo"]
        assert ppo[ppo.index("--init-from") + 1] == str(out / "policy")
        assert ppo[ppo.index("--reward-model") + 1] == str(out / seed / "reward")
        assert "--reward-model" not in commands[f"{seed}/dpo"]
    assert read_times(out).keys() > commands.keys()
    commands.clear()
    stages.run_experiment(out, TINY, tmp_path, (1, 2), arms)
    assert not commands


@pytest.mark.processes
@pytest.mark.slow
def test_a_killed_experiment_goes_on_and_reports_every_arm(tmp_path):
    out, reviews = tmp_path / "with a space", tmp_path / "reviews.jsonl"
    write_reviews(reviews)
    command = ["-m", "jaxgpt", "rlhf-reviews", "--scale", "tiny", "--out-dir", str(out)]
    command += ["--reviews", str(reviews), "--seeds", "1"]
    first = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that its trainings can be killed with it
    )
    training = out / "seed-1" / "ppo-low" / "metrics.jsonl"
    deadline = time.monotonic() + 1200
    while not training.exists() and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    before, files = read_times(out), contents(out / "data")
    assert before

    page, err = finish(start_script(*command))
    assert "== policy" not in err
    assert contents(out / "data") == files
    times = read_times(out)
    assert {name: times[name] for name in before} == before
    assert page == (out / "report.md").read_text()
    report = json.loads((out / "report.json").read_text())
    arms = ["pre-trained", "best-of-3", *TINY.arms]
    assert list(report["results"]) == arms
    for arm in arms:
        assert f"| {arm} |" in page
        path = out / "seed-1" / "samples" / f"{arm}.jsonl"
        rows = read_lines(path)
        assert len(rows) == TINY.evaluated
        assert all(row["ended"] or row["tokens"] == 12 for row in rows)
        if arm == "pre-trained":
            assert all(r["log_prob"] == r["reference_log_prob"] for r in rows)
    judged = read_lines(out / "judged.jsonl")
    assert len(judged) == (len(arms) + 1) * TINY.evaluated  # and people
    prompts, judged_on = (
        {row["prompt"] for row in read_lines(out / "data" / name)}
        for name in ("prompts.jsonl", "beginnings.jsonl")
    )
    assert len(judged_on) == TINY.evaluated
    assert not prompts & judged_on
    parts = ("positive", "no_repeat", "ended", "likely")
    assert all(row["gold"] == all(row[part] for part in parts) for row in judged)
    assert (out / "gold.png").stat().st_size > 10_000

    written = contents(out)
    again, err = finish(start_script(*command))  # nothing is left to do
    assert (again, contents(out)) == (page, written)
    assert "==" not in err
    _, err = finish(start_script(*command[:4], "full", *command[5:]), code=1)
    assert "--out-dir" in err
