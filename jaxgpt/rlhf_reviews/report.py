"""The report: gold is computed here, from saved continuations, and nowhere else.

S seeds   N beginnings   R resamples   P preferences   C features
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.files import replace_file
from jaxgpt.posttrain.rewards import score
from jaxgpt.rlhf_reviews import judges
from jaxgpt.rlhf_reviews.arms import PRETRAINED, Settings
from jaxgpt.rlhf_reviews.data import LABELS, as_rollout, pieces, read_lines, write_lines
from jaxgpt.rlhf_reviews.statistics import (
    Interval,
    Resamples,
    at_kl,
    interval,
    resample,
)
from jaxgpt.run import Run, load_run
from jaxgpt.text.tables import SPLITS, splits_of

_JUDGED = ("gold", "not_counting_ended", *judges.PARTS, "vader")
_FREE_KL = 30  # nats that PPO without a penalty is to reach
_SHOWN = 4  # beginnings
_REVIEWS = 500  # of part D, to measure gold's classifier on
_Key = tuple[str, int | None]  # arm and seed
_HUMANS: _Key = ("people", None)
_Rows = Sequence[dict[str, Any]]
_Judged = dict[_Key, dict[str, np.ndarray]]


def write_report(
    out: Path, settings: Settings, seeds: Sequence[int], arms: Sequence[str]
) -> None:
    """Judges continuations, and writes judged.jsonl, report.json and .md, and gold.png.

    A report of the same seeds and arms stays as it is. Another one judges only what
    judged.jsonl lacks.
    """
    path = out / "report.json"
    asked = {"seeds": list(seeds), "arms": list(arms)}
    if path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
        if all(report[name] == value for name, value in asked.items()):
            return
    gold = _make_gold(out, settings)
    samples: dict[_Key, _Rows] = {
        (arm, seed): read_lines(out / f"seed-{seed}" / "samples" / f"{arm}.jsonl")
        for arm in arms
        for seed in seeds
    }
    humans = {_HUMANS: read_lines(out / "data" / "beginnings.jsonl")}
    judged = _judge_once(out / "judged.jsonl", gold, samples | humans)
    columns = {arm: _columns(arm, seeds, samples, judged) for arm in arms}
    if settings.best_of_name in columns:
        kl_SN = columns[settings.best_of_name]["kl"]
        columns[settings.best_of_name]["kl"] = np.full_like(kl_SN, settings.best_of_kl)
    draws = resample(len(seeds), settings.evaluated)
    report = asked | {
        "best_of": settings.best_of_name,
        "gold_classifier_accuracy": _accuracy(out, gold.classifier, settings.piece),
        "likely_band": gold.band,
        "humans": {name: float(judged[_HUMANS][name].mean()) for name in _JUDGED},
        "results": {arm: _summary(columns[arm], draws) for arm in arms},
        "comparisons": _comparisons(columns, draws, settings),
        "reward_model": _check_reward_models(out, seeds),
        "seconds": json.loads((out / "times.json").read_text(encoding="utf-8")),
        "samples": [
            {arm: samples[arm, seeds[0]][n]["text"] for arm in arms}
            | {"prompt": samples[arms[0], seeds[0]][n]["prompt"]}
            for n in range(_SHOWN)
        ],
    }
    _plot(columns, out / "gold.png")
    for name, text in (
        ("report.md", to_markdown(report)),
        ("report.json", json.dumps(report, indent=1) + "\n"),
    ):
        replace_file(out / name, partial(_write, text))


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _make_gold(out: Path, settings: Settings) -> judges.Gold:
    """Measures part A's people by part C's model."""
    model, humans = load_run(out / "gold-lm"), read_lines(out / "data/prompts.jsonl")
    prompts, texts = ([row[name] for row in humans] for name in ("prompt", "text"))
    band = judges.human_band(judges.mean_log_probs(model, prompts, texts))
    return judges.Gold(load_run(out / "gold-classifier"), model, band)


def _judge_once(path: Path, gold: judges.Gold, samples: dict[_Key, _Rows]) -> _Judged:
    """Judges what the file lacks, which it then has; returns bool [N] by name."""
    lines = read_lines(path) if path.exists() else []
    known = {(line["arm"], line["seed"]) for line in lines}
    for (arm, seed), rows in samples.items():
        if (arm, seed) not in known:
            found = judges.judge(gold, rows)
            for n in range(len(rows)):
                line = {name: bool(found[name][n]) for name in _JUDGED}
                lines.append({"arm": arm, "seed": seed, "beginning": n} | line)
    write_lines(path, lines)
    judged: _Judged = {}
    for key in samples:
        each = [line for line in lines if (line["arm"], line["seed"]) == key]
        judged[key] = {
            name: np.array([line[name] for line in each]) for name in _JUDGED
        }
    return judged


def _accuracy(out: Path, classifier: Run, words: int) -> float:
    """A classifier's share of right labels on pieces of part D, which is new to it."""
    reviews = read_lines(out / "data" / "D.jsonl")
    found = pieces(reviews[:: max(1, len(reviews) // _REVIEWS)], words)
    labels_N = np.array([piece["label"] == LABELS[1] for piece in found])
    positive_N = judges.is_positive(classifier, [piece["text"] for piece in found])
    return float((positive_N == labels_N).mean())


def _columns(
    arm: str, seeds: Sequence[int], samples: dict[_Key, _Rows], judged: _Judged
) -> dict[str, np.ndarray]:
    """The figures of each continuation of an arm, [S, N] each.

    The proxy is in units of the pre-trained policy's standard deviation, of each seed.
    """

    def values(name: str, arm: str = arm) -> np.ndarray:
        return np.array([[row[name] for row in samples[arm, seed]] for seed in seeds])

    base_SN = values("score", PRETRAINED)
    mean_S1 = base_SN.mean(axis=1, keepdims=True)
    std_S1 = base_SN.std(axis=1, keepdims=True)
    found = {
        name: np.array([judged[arm, seed][name] for seed in seeds]) for name in _JUDGED
    }
    return found | {
        "tokens": values("tokens"),
        "kl": values("log_prob") - values("reference_log_prob"),
        "proxy": (values("score") - mean_S1) / std_S1,
    }


def _summary(columns: dict[str, np.ndarray], draws: Resamples) -> dict[str, Any]:
    """Of each figure the mean, its standard error, and the mean of each seed.

    The error is of beginnings and seeds; `seed_errors` are of beginnings alone.
    """
    found = {}
    for name, values_SN in columns.items():
        values_R = draws.means(values_SN)
        error_S = values_SN.std(axis=1, ddof=1) / values_SN.shape[1] ** 0.5
        found[name] = {
            "mean": float(values_R[0]),
            "error": float(values_R[1:].std()),
            "seeds": values_SN.mean(axis=1).tolist(),
            "seed_errors": error_S.tolist(),
        }
    return found


def _comparisons(
    columns: dict[str, dict[str, np.ndarray]], draws: Resamples, settings: Settings
) -> dict[str, Any]:
    """Paired differences of arms, as (value, low, high) with 95% intervals."""
    means = {
        arm: {name: draws.means(found[name]) for name in (*_JUDGED, "kl", "proxy")}
        for arm, found in columns.items()
    }

    def minus(a: str, b: str, name: str) -> Interval:
        return interval(means[a][name] - means[b][name])

    curve_arms = [arm for arm in (PRETRAINED, "ppo-low", "ppo") if arm in means]
    found: dict[str, Any] = {"minus_pre_trained": {}, "ppo_at_equal_kl": {}}
    for arm in means:
        if arm != PRETRAINED:
            names = ("gold", "not_counting_ended", "vader", "proxy")
            differences = {name: minus(arm, PRETRAINED, name) for name in names}
            found["minus_pre_trained"][arm] = differences
    for arm in (settings.best_of_name, "dpo"):
        if arm in means:
            each: dict[str, Any] = {}
            kl_R = means[arm]["kl"]
            for name in ("gold", "not_counting_ended", "proxy"):
                points = [(means[a]["kl"], means[a][name]) for a in curve_arms]
                each[name] = interval(at_kl(kl_R, points) - means[arm][name])
            largest = max(means[a]["kl"][0] for a in curve_arms)
            each["inside"] = bool(kl_R[0] <= largest)
            found["ppo_at_equal_kl"][arm] = each
    if "beta-0" in means:
        found["beta_0_minus_ppo"] = {
            name: minus("beta-0", "ppo", name) for name in ("gold", "proxy")
        }
    return found


def _check_reward_models(out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Accuracy on held-out preferences without flips, beside the best linear fit.

    That is a Bradley-Terry model of the labeller's own features, trained on the same
    preferences, flips included. The quartiles are of the labeller's margin, from the
    smallest; pairs without a margin are left out.
    """
    pairs = read_lines(out / "data" / "preferences.jsonl")
    prompts = [pair["prompt"] for pair in pairs]
    split_P = splits_of([json.dumps(prompt) for prompt in prompts], 0.1)
    train, test = (
        [pairs[p] for p in np.flatnonzero(split_P == SPLITS.index(name))]
        for name in ("train", "test")
    )
    test = [pair for pair in test if pair["margin"]]
    margin_P = np.array([pair["margin"] for pair in test])
    quartile_P = np.searchsorted(
        np.percentile(np.abs(margin_P), (25, 50, 75)), np.abs(margin_P)
    )

    def accuracy(margins_P: np.ndarray) -> dict[str, Any]:
        right_P = np.sign(margins_P) == np.sign(margin_P)
        quarters = [float(right_P[quartile_P == q].mean()) for q in range(4)]
        return {"accuracy": float(right_P.mean()), "by_quartile": quarters}

    def margins(model: Run) -> np.ndarray:
        chosen_P, rejected_P = (
            score(model, as_rollout(model, *_texts(test, name)))
            for name in ("chosen", "rejected")
        )
        return chosen_P - rejected_P

    labeller = judges.train_labeller(read_lines(out / "data" / "B.jsonl"))
    return {
        "pairs": len(test),
        "seeds": [
            accuracy(margins(load_run(out / f"seed-{seed}" / "reward")))
            for seed in seeds
        ],
        "refit": accuracy(_refit(labeller, train, test)),
    }


def _texts(pairs: Sequence[dict[str, Any]], name: str) -> tuple[list[str], list[str]]:
    return [pair["prompt"] for pair in pairs], [pair[name] for pair in pairs]


def _refit(
    labeller: judges.Labeller,
    train: Sequence[dict[str, Any]],
    test: Sequence[dict[str, Any]],
) -> np.ndarray:
    """The margins of test pairs by a Bradley-Terry model of the labeller's features."""
    from sklearn.linear_model import LogisticRegression

    def differences(pairs: Sequence[dict[str, Any]]) -> Any:
        chosen_PC, rejected_PC = (
            labeller.words([pair["prompt"] + pair[name] for pair in pairs])
            for name in ("chosen", "rejected")
        )
        return chosen_PC - rejected_PC

    x_PC, sign_P = differences(train), np.resize([1, -1], len(train))
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(x_PC.multiply(sign_P[:, None]).tocsr(), sign_P)
    return np.asarray(differences(test) @ model.coef_[0])


def _plot(columns: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Plots gold and proxy of each arm and seed against the root of the divergence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = (("gold", "share of gold"), ("proxy", "proxy, standard deviations"))
    for axes, (name, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for index, (arm, found) in enumerate(columns.items()):
            x_S = np.sqrt(np.maximum(found["kl"].mean(axis=1), 0))
            y_S, colour = found[name].mean(axis=1), f"C{index}"
            axes.plot(x_S, y_S, "o", color=colour, alpha=0.5, markersize=5)
            middle = x_S.mean(), y_S.mean()
            axes.plot(*middle, "D", color=colour, markersize=8, label=arm)
        axes.set(xlabel="square root of the KL in nats", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    replace_file(path, lambda tmp: figure.savefig(tmp, dpi=120, format="png"))


def to_markdown(report: dict[str, Any]) -> str:
    """The report as a page: tables, comparisons, the reward model, samples, times."""
    return (
        "\n\n".join(
            [
                "# RLHF on movie reviews",
                _arms_table(report),
                _comparison_text(report),
                _hacking_text(report),
                _reward_text(report),
                "![Gold and proxy against KL](gold.png)",
                _samples_text(report),
                _times_text(report),
            ]
        )
        + "\n"
    )


def _arms_table(report: dict[str, Any]) -> str:
    names = ("gold", "not_counting_ended", *judges.PARTS, "vader")
    titles = "| arm | KL | proxy | gold | of each seed | without ended | positive | "
    titles += "no repeat | ended | likely | VADER | tokens |"
    lines = [titles, "|---" + "|--:" * 11 + "|"]
    for arm, found in report["results"].items():
        kl, gold = found["kl"], found["gold"]
        cells = [
            arm,
            f"≤ {kl['mean']:.2f}"
            if arm == report["best_of"]
            else f"{kl['mean']:.2f} ± {kl['error']:.2f}",
            f"{found['proxy']['mean']:+.2f}",
            f"{gold['mean']:.1%} ± {gold['error']:.1%}",
            " ".join(f"{value:.1%}" for value in gold["seeds"]),
            *(f"{found[name]['mean']:.1%}" for name in names[1:]),
            f"{found['tokens']['mean']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    people = [f"{report['humans'][name]:.1%}" for name in names]
    cells = ["people", "", "", people[0], "", *people[1:], ""]
    lines.append(f"| {' | '.join(cells)} |")
    low, high = report["likely_band"]
    seeds = ", ".join(map(str, report["seeds"]))
    lines += [
        "",
        "Gold is the share of continuations that are positive, repeat no trigram, have "
        "ended and are likely; `without ended` does not ask for the end. Likely is a "
        f"mean log-probability of the tokens between {low:.2f} and {high:.2f}. Gold's "
        f"classifier is right for {report['gold_classifier_accuracy']:.1%} of pieces "
        "of part D's reviews.",
        "",
        f"Means over seeds {seeds}; ± is the standard error over beginnings and "
        "seeds, which is rough with few seeds. KL is in nats per continuation; that of "
        f"{report['best_of']} is an upper bound, log n - (n - 1) / n. The proxy is the "
        "reward model's score, in standard deviations of the pre-trained policy's.",
    ]
    return "\n".join(lines)


def _points(value: Sequence[float]) -> str:
    """A difference of shares in percentage points."""
    middle, low, high = (100 * each for each in value)
    return f"{middle:+.1f} points ({low:+.1f} to {high:+.1f})"


def _comparison_text(report: dict[str, Any]) -> str:
    found, lines = report["comparisons"], ["Paired differences, 95% intervals:", ""]
    for arm, each in found["minus_pre_trained"].items():
        lines.append(
            f"- {arm} minus {PRETRAINED}: gold {_points(each['gold'])}, without ended "
            f"{_points(each['not_counting_ended'])}, VADER {_points(each['vader'])}"
        )
    for arm, each in found["ppo_at_equal_kl"].items():
        beyond = "" if each["inside"] else f"; PPO's largest KL is below {arm}'s"
        lines.append(
            f"- PPO minus {arm} at {arm}'s KL: gold {_points(each['gold'])}, without "
            f"ended {_points(each['not_counting_ended'])}{beyond}"
        )
    lines += [
        "",
        "PPO at an arm's KL is interpolated linearly in the square root of KL between "
        "the pre-trained policy, ppo-low and ppo; beyond, it is the last of them. "
        f"At the upper bound of {report['best_of']}'s KL, PPO may have the larger KL.",
    ]
    return "\n".join(lines)


def _hacking_text(report: dict[str, Any]) -> str:
    """Whether the reward was hacked without a penalty, as the numbers say."""
    change = report["comparisons"].get("beta_0_minus_ppo")
    if not change:
        return "PPO without a penalty was not trained."
    kl = report["results"]["beta-0"]["kl"]["mean"]
    reached = f"reached a KL of {kl:.1f} nats"
    if kl < _FREE_KL:
        reached += f", not the {_FREE_KL} that were aimed at"
    (_, low, high), proxy = change["gold"], change["proxy"]
    against = f"Against PPO its gold changed by {_points(change['gold'])}"
    against += f" and its proxy by {proxy[0]:+.2f} ({proxy[1]:+.2f} to {proxy[2]:+.2f})"
    if high < 0 < proxy[1]:
        verdict = "gold fell while the proxy rose: the reward was hacked"
    elif low > 0:
        verdict = "gold rose too: the reward was not hacked"
    else:
        verdict = "these numbers do not show that the reward was hacked"
    return f"PPO with beta 0 {reached}. {against}: {verdict}."


def _reward_text(report: dict[str, Any]) -> str:
    found = report["reward_model"]
    rows = [*zip(report["seeds"], found["seeds"], strict=True)]
    named = [(f"seed {seed}", each) for seed, each in rows]
    named.append(("refit on the labeller's features", found["refit"]))
    lines = [
        f"Reward model on {found['pairs']:,} held-out preferences without flips; "
        "quartiles of the labeller's margin, from the smallest:",
        "",
        "| | all | 1 | 2 | 3 | 4 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, each in named:
        figures = (each["accuracy"], *each["by_quartile"])
        cells = " | ".join(f"{value:.3f}" for value in figures)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def _samples_text(report: dict[str, Any]) -> str:
    lines = [f"Samples of seed {report['seeds'][0]}:"]
    for sample in report["samples"]:
        lines += ["", f"**{_inline(sample['prompt'])}**", ""]
        lines += [f"- {arm}: {_inline(sample[arm])}" for arm in report["arms"]]
    return "\n".join(lines)


def _inline(text: str) -> str:
    """A text as one line of Markdown, without its marks."""
    words = " ".join(text.split())
    return "".join(f"\\{c}" if c in r"\`*_<>[]#|" else c for c in words)


def _times_text(report: dict[str, Any]) -> str:
    lines = ["| stage | seconds |", "|---|--:|"]
    seconds, totals = report["seconds"], []
    for name, each in seconds.items():
        lines.append(f"| {name} | {each:.0f} |")
    shared = sum(each for name, each in seconds.items() if not name.startswith("seed-"))
    for seed in report["seeds"]:
        own = sum(
            each
            for name, each in seconds.items()
            if name.startswith(f"seed-{seed}/") and not name.endswith("/beta-0")
        )
        totals.append(f"{(shared + own) / 60:.1f} minutes with seed {seed}")
    lines += [
        "",
        f"All stages but those of beta-0 take {', '.join(totals)}, of which "
        f"{shared / 60:.1f} are shared by all seeds.",
    ]
    return "\n".join(lines)
