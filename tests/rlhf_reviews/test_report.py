import numpy as np
import pytest

from jaxgpt import DataConfig
from jaxgpt.rlhf_reviews import judges, report
from jaxgpt.rlhf_reviews.arms import FULL, PRETRAINED, SCALES, TRAINED
from jaxgpt.rlhf_reviews.data import write_lines
from jaxgpt.rlhf_reviews.statistics import resample
from jaxgpt.text.preferences import open_preferences
from jaxgpt.text.tables import SPLITS


def column(means, kl):
    """Figures of one seed and 100 beginnings, with these shares of gold and proxy."""
    gold, proxy = means
    ones = np.ones((1, 100))
    found = {name: np.arange(100)[None] < 100 * gold for name in report._JUDGED}
    return found | {"proxy": proxy * ones, "kl": kl * ones}


COLUMNS = {
    PRETRAINED: column((0.2, 0.0), 0.0),
    "best-of-16": column((0.35, 1.5), 1.0),
    "ppo-low": column((0.4, 1.0), 4.0),
    "ppo": column((0.6, 2.0), 9.0),
    "dpo": column((0.5, 1.2), 12.25),
    "beta-0": column((0.3, 4.0), 36.0),
}


def test_comparisons_are_differences_also_at_equal_divergence():
    found = report._comparisons(COLUMNS, resample(1, 100), FULL)
    above = found["minus_pre_trained"]
    assert above["ppo"]["gold"].value == pytest.approx(0.4)
    assert above["ppo"]["gold"].low < 0.4 < above["ppo"]["gold"].high
    at_best_of = found["ppo_at_equal_kl"]["best-of-16"]
    assert at_best_of["gold"].value == pytest.approx(0.2 + 0.2 / 2 - 0.35)
    assert at_best_of["proxy"].value == pytest.approx(0.5 - 1.5)
    assert at_best_of["inside"]
    at_dpo = found["ppo_at_equal_kl"]["dpo"]  # beyond the curve: its end
    assert at_dpo["gold"].value == pytest.approx(0.6 - 0.5)
    assert not at_dpo["inside"]


@pytest.mark.parametrize(
    ("beta_0", "verdict"),
    [
        (((0.3, 4.0), 36.0), "the reward was hacked"),
        (((0.9, 4.0), 36.0), "the reward was not hacked"),
        (((0.6, 4.0), 36.0), "do not show that the reward was hacked"),
        (((0.3, 1.0), 36.0), "do not show that the reward was hacked"),
        (((0.3, 4.0), 16.0), "not the 30 that were aimed at"),
    ],
)
def test_whether_the_reward_was_hacked_follows_from_the_numbers(beta_0, verdict):
    columns, draws = COLUMNS | {"beta-0": column(*beta_0)}, resample(1, 100)
    content = {
        "results": {"beta-0": report._summary(columns["beta-0"], draws)},
        "comparisons": report._comparisons(columns, draws, FULL),
    }
    text = report._hacking_text(content)
    assert verdict in text
    assert f"reached a KL of {beta_0[1]:.1f} nats" in text


def test_best_of_n_has_the_divergence_of_the_formula():
    assert FULL.best_of_kl == pytest.approx(1.835, abs=1e-3)


def test_every_scale_has_every_arm():
    assert all(set(settings.arms) == set(TRAINED) for settings in SCALES.values())


def samples(scores, **others):
    """Continuations with these scores."""
    row = {"tokens": 3, "log_prob": -1.0, "reference_log_prob": -1.5} | others
    return [row | {"score": score} for score in scores]


def test_the_proxy_is_in_deviations_of_the_policy_of_each_seed():
    found = {
        (PRETRAINED, 1): samples([1.0, 3.0]),
        (PRETRAINED, 2): samples([10.0, 30.0]),
    }
    found |= {("ppo", 1): samples([2.0, 4.0]), ("ppo", 2): samples([40.0, 0.0])}
    judged = {key: {name: np.ones(2, bool) for name in report._JUDGED} for key in found}
    columns = report._columns("ppo", (1, 2), found, judged)
    assert columns["proxy"] == pytest.approx(np.array([[0.0, 2.0], [2.0, -2.0]]))
    assert columns["kl"] == pytest.approx(0.5)


def test_what_was_judged_is_not_judged_again(tmp_path, monkeypatch):
    seen = []

    def judge(_, rows):
        seen.append(rows)
        values_N = np.array([row["score"] > 0 for row in rows])
        return {name: values_N for name in report._JUDGED}

    monkeypatch.setattr(judges, "judge", judge)
    path, first = tmp_path / "judged.jsonl", {("ppo", 1): samples([1.0, -1.0])}
    report._judge_once(path, None, first)
    before = path.read_text()
    more = {("ppo", 1): samples([-9.0, -9.0]), ("dpo", 1): samples([-1.0, -1.0])}
    more |= {("ppo", 2): samples([1.0, 1.0])}
    judged = report._judge_once(path, None, more)
    assert seen == [first["ppo", 1], more["dpo", 1], more["ppo", 2]]
    assert path.read_text().startswith(before)
    golds = {key: found["gold"].tolist() for key, found in judged.items()}
    assert golds == {
        ("ppo", 1): [True, False],
        ("dpo", 1): [False, False],
        ("ppo", 2): [True, True],
    }


def test_the_band_is_of_the_people_of_part_a(tmp_path, monkeypatch):
    rows = [{"prompt": "a", "text": str(n)} for n in range(101)]
    write_lines(tmp_path / "data" / "prompts.jsonl", rows)
    monkeypatch.setattr(report, "load_run", lambda folder: folder.name)
    monkeypatch.setattr(
        judges, "mean_log_probs", lambda model, _, texts: np.array([*map(float, texts)])
    )
    gold = report._make_gold(tmp_path, FULL)
    assert gold == ("gold-classifier", "gold-lm", (5, 95))


WORTH = {"superb": 2.0, "fine": 1.0, "film": 0.0, "weak": -1.0, "awful": -2.0}


def preferences(flipped):
    """Pairs of words, each of several prompts, of which a share is flipped."""
    rng, rows = np.random.default_rng(0), []
    for n in range(1500):
        chosen, rejected = rng.choice([*WORTH], 2, replace=False).tolist()
        wrong = WORTH[chosen] < WORTH[rejected]
        if wrong != (rng.random() < flipped):
            chosen, rejected = rejected, chosen
        margin = WORTH[chosen] - WORTH[rejected]
        row = {"prompt": f"{n} ", "chosen": chosen, "rejected": rejected}
        rows.append(row | {"margin": margin})
    rows += [
        {"prompt": f"x{n}", "chosen": "film", "rejected": "plot", "margin": 0.0}
        for n in range(100)
    ]
    return rows


def test_reward_models_are_judged_without_flips_on_what_is_held_out(
    tmp_path, monkeypatch
):
    rows, path = preferences(0.2), tmp_path / "data" / "preferences.jsonl"
    write_lines(path, rows)
    reviews = [
        {"text": word, "label": "positive" if worth > 0 else "negative"}
        for word, worth in WORTH.items()
        for _ in range(20)
    ]
    write_lines(tmp_path / "data" / "B.jsonl", reviews)
    seen = []

    def score(name, texts):
        seen.append(texts)
        worth_P = np.array([WORTH[text] for _, text in texts])
        return -worth_P if name == "2" else np.where(np.abs(worth_P) > 1, worth_P, 0)

    monkeypatch.setattr(report, "load_run", lambda folder: folder.parent.name[-1])
    monkeypatch.setattr(
        report, "as_rollout", lambda _, *both: [*zip(*both, strict=True)]
    )
    monkeypatch.setattr(report, "score", score)
    found = report._check_reward_models(tmp_path, (1, 2))

    _, split_N = open_preferences(DataConfig(path=(str(path),)), True).read()
    held_out = split_N == SPLITS.index("test")
    tested = [row for row, kept in zip(rows, held_out, strict=True) if kept]
    tested = [row for row in tested if row["margin"]]
    assert [(row["prompt"], row["chosen"]) for row in tested] == seen[0]
    assert found["pairs"] == len(tested)
    # the first knows superb and awful alone, the second is always wrong
    known = np.mean(
        [bool({"superb", "awful"} & {r["chosen"], r["rejected"]}) for r in tested]
    )
    assert found["seeds"][0]["accuracy"] == pytest.approx(known)
    assert found["seeds"][0]["by_quartile"][-1] == 1
    assert found["seeds"][1] == {"accuracy": 0.0, "by_quartile": [0.0] * 4}
    assert found["refit"]["accuracy"] == 1  # the flips do not mislead it


def test_the_time_of_a_seed_has_what_is_shared_and_not_beta_0():
    seconds = {"policy": 600.0, "seed-1/reward": 60.0, "seed-1/samples/ppo": 60.0}
    seconds |= {"seed-1/beta-0": 9e3, "seed-1/samples/beta-0": 9e3}
    seconds |= {"seed-2/reward": 300.0, "seed-12/reward": 9e3}
    text = report._times_text({"seconds": seconds, "seeds": [1, 2]})
    assert "take 12.0 minutes with seed 1, 15.0 minutes with seed 2" in text
    assert "10.0 are shared" in text
