"""Classifiers on their test split, beside TF-IDF with logistic regression.

python -m benchmarks.sentiment --run-dir RUN
python -m benchmarks.sentiment --run-dir RUN_1 RUN_2 RUN_3 --versus RUN_4 RUN_5 RUN_6

The baseline's features are words and pairs of words that occur in at least two texts of
the training part, with weights (1 + ln count) times the inverse document frequency. Of
several strengths of L2 regularisation, it uses the one with the highest accuracy on the
validation split. Its seconds include that choice; those of a run are the whole of
train.py.

Of several runs, as with several seeds, it prints mean and standard deviation. Those of
--versus are compared in pairs with those of --run-dir, in the order given: the mean of
the differences, and its standard error.
"""

import io
import json
import math
import sys
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.rounds import Facts, machine, write_json

_STRENGTHS = (1.0, 3.0, 10.0, 30.0)  # C of scikit-learn, the inverse of the penalty
_FIGURES = ("loss", "accuracy", "macro_f1", "calibration_error", "seconds")


@dataclass(frozen=True)
class Arguments:
    """Compares classifiers with TF-IDF and logistic regression, and with each other."""

    run_dir: tuple[Path, ...]  # runs written by train.py
    versus: tuple[Path, ...] = ()  # as many other runs, of the same seeds
    checkpoint: str = "best"  # best, latest or a step
    out: Path | None = None  # the report, as JSON


def main() -> None:
    """Measures, prints a table and writes the report."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.sentiment")
    from jaxgpt import start
    from jaxgpt.run import load_config

    start.start()
    groups = [arguments.run_dir, arguments.versus]
    if len(groups[1]) not in (0, len(groups[0])):
        sys.exit("give as many runs with --versus as with --run-dir")
    if len({load_config(each).data.sha256 for group in groups for each in group}) > 1:
        sys.exit("the runs have different corpora; give runs of the same one")
    reports = {"TF-IDF": measure_baseline(groups[0][0])}
    for run_dir in (*groups[0], *groups[1]):
        reports[str(run_dir)] = measure_run(run_dir, arguments.checkpoint)
    rows = {name: figures(report) for name, report in reports.items()}
    in_groups = [[rows[str(run_dir)] for run_dir in group] for group in groups]
    table: dict[str, dict[str, str]] = {
        name: {figure: f"{value:.4g}" for figure, value in row.items()}
        for name, row in rows.items()
    }
    if len(groups[0]) > 1:
        for name, group in zip(("--run-dir", "--versus"), in_groups, strict=True):
            if group:
                table[f"mean of {name}"] = spread(group)
    if groups[1]:
        table["--versus less --run-dir"] = difference(*in_groups)
    names = list(next(iter(table.values())))
    width = max(map(len, table))
    print(" " * width, *(f"{name:>18}" for name in names))
    for name, cells in table.items():
        print(f"{name:{width}}", *(f"{cells[figure]:>18}" for figure in names))
    if arguments.out:
        facts = machine("benchmarks.sentiment", "gpu")
        write_json(arguments.out, facts | {"reports": reports, "table": table})


def measure_run(run_dir: Path, checkpoint: str) -> Facts:
    """Returns what `evaluate --json` prints of the test split, and train's seconds."""
    from jaxgpt.commands.evaluate import evaluate
    from jaxgpt.training.monitor import METRICS, read_rows

    with redirect_stdout(io.StringIO()) as printed:
        evaluate(run_dir, checkpoint, "test", json=True)
    seconds = [row["elapsed_seconds"] for row in read_rows(run_dir / METRICS)]
    return json.loads(printed.getvalue()) | {"seconds": max(seconds, default=math.nan)}


def measure_baseline(run_dir: Path) -> Facts:
    """Fits TF-IDF and logistic regression to a run's corpus; returns such a report."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    from jaxgpt.run import load_config, require_task
    from jaxgpt.terminal import log_line
    from jaxgpt.text.tables import SPLITS
    from jaxgpt.text.tasks import open_table
    from jaxgpt.training.label_metrics import label_metrics

    config = load_config(run_dir)
    labels = require_task(config, "classification").labels
    rows, split_N = open_table("classification", config.data, log_line).read()
    columns = [np.array(column, object) for column in zip(*rows, strict=True)]
    texts, true, sources = columns
    train, val, test = (split_N == SPLITS.index(name) for name in SPLITS)
    started = time.perf_counter()
    tfidf = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    features = tfidf.fit_transform(texts[train])
    of_val = tfidf.transform(texts[val])
    models = {
        C: LogisticRegression(C=C, max_iter=1000).fit(features, true[train])
        for C in _STRENGTHS
    }
    accuracies = {C: model.score(of_val, true[val]) for C, model in models.items()}
    C = max(accuracies, key=accuracies.__getitem__)
    seconds = time.perf_counter() - started
    model = models[C]
    order = [model.classes_.tolist().index(label) for label in labels]
    log_probs_NK = model.predict_log_proba(tfidf.transform(texts[test]))[:, order]
    labels_N = np.array([labels.index(label) for label in true[test]])
    names = sorted(set(sources[test]) - {""})
    by_source = {
        name: label_metrics(log_probs_NK[of_source], labels_N[of_source])
        for name in names
        for of_source in [sources[test] == name]
    }
    found = label_metrics(log_probs_NK, labels_N) | {"by_source": by_source}
    return found | {"C": C, "val_accuracies": accuracies, "seconds": seconds}


def figures(report: Facts) -> dict[str, float]:
    """The figures of a report by their name in the table."""
    of_all = {name.replace("_", " "): float(report[name]) for name in _FIGURES}
    by_source = {
        f"on {name}": float(found["accuracy"])
        for name, found in report.get("by_source", {}).items()
    }
    return of_all | by_source


def spread(rows: list[dict[str, float]]) -> dict[str, str]:
    """Mean and standard deviation of each figure over at least two runs."""
    return {
        name: f"{values.mean():.4g} ± {values.std(ddof=1):.2g}"
        for name, values in _by_name(rows).items()
    }


def difference(
    rows: list[dict[str, float]], others: list[dict[str, float]]
) -> dict[str, str]:
    """How much higher the others' figures are: mean, and standard error by pairs."""
    first, second = _by_name(rows), _by_name(others)
    cells = {}
    for name, values in first.items():
        gains = second[name] - values
        cells[name] = f"{gains.mean():+.4g}"
        if len(gains) > 1:
            error = gains.std(ddof=1) / np.sqrt(len(gains))
            cells[name] += f" ± {error:.2g}"
    return cells


def _by_name(rows: list[dict[str, float]]) -> dict[str, Any]:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


if __name__ == "__main__":
    main()
