"""The report on a classifier: its metrics, overall and by source, and its confusion."""

from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxgpt.commands.attention import find_fonts
from jaxgpt.config import Config
from jaxgpt.files import replace_file
from jaxgpt.run import Run, require_task
from jaxgpt.terminal import progress
from jaxgpt.text.examples import LabelledTexts
from jaxgpt.training.evaluation import label_log_probs
from jaxgpt.training.label_metrics import label_metrics

_MOST_PANELS = 5  # sources in the picture
_MOST_SHOWN = 20  # labels in the table and with numbers in the picture


def evaluate_labels(
    run: Run, examples: LabelledTexts, config: Config, mesh: Mesh
) -> dict[str, Any]:
    """Measures a classifier; see `label_metrics` for each figure.

    Returns the figures of all examples and, if sources are known, `by_source` those of
    each. `labels` are in the order of the rows and columns of `confusion`.
    """
    labels = require_task(config, "classification").labels
    with progress("evaluating", len(examples)) as advance:
        log_probs_NK = label_log_probs(
            run.model, run.params, examples, config, mesh, advance
        )

    def measure(rows: Any) -> dict[str, Any]:
        found = label_metrics(log_probs_NK[rows], examples.labels_N[rows])
        return found | {"f1": dict(zip(labels, found["f1"], strict=True))}

    report = {"labels": list(labels)} | measure(slice(None))
    if names := set(examples.sources_N.tolist()) - {""}:
        sources_N = np.asarray(examples.sources_N)
        report["by_source"] = {
            name: measure(sources_N == name) for name in sorted(names)
        }
    return report


def show_labels(report: dict[str, Any]) -> None:
    """Prints tables of the confusion and of the sources."""
    console, labels = Console(), report["labels"]
    if len(labels) <= _MOST_SHOWN:
        table = Table(title="True labels (rows) and predictions (columns)")
        table.add_column()
        for heading in (*labels, "F1"):
            table.add_column(Text(heading), justify="right")
        for label, row in zip(labels, report["confusion"], strict=True):
            f1 = f"{report['f1'][label]:.4f}"
            table.add_row(Text(label), *map(str, row), f1)
        console.print(table)
    if sources := report.get("by_source"):
        table = Table(title="By source")
        names = ("examples", "loss", "accuracy", "macro_f1", "calibration_error")
        table.add_column()
        for name in names:
            table.add_column(name.replace("_", " "), justify="right")
        for source, found in sources.items():
            cells = {name: f"{found[name]:.4f}" for name in names[1:]}
            cells["accuracy"] += f" ± {found['accuracy_standard_error']:.4f}"
            table.add_row(Text(source), str(found["examples"]), *cells.values())
        console.print(table)


def draw_confusion(report: dict[str, Any], name: str, path: Path) -> None:
    """Draws the confusion as a PNG, of all examples and of each source.

    The colour is the share of each true label.

    Args:
      name: of the examples, for the title.
    """
    from matplotlib.figure import Figure  # takes half a second, needed only here

    labels, sources = report["labels"], report.get("by_source", {})
    parts = {"all": report} | (sources if len(sources) <= _MOST_PANELS else {})
    side = min(max(3.5, 0.7 * len(labels)), 20)  # inches
    figure = Figure(figsize=(side * len(parts) + 1, side), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    families, _ = find_fonts(c for c in "".join(labels) if c.isprintable())
    style: dict[str, Any] = {"family": families, "parse_math": False}
    for axes, (part, found) in zip(panels, parts.items(), strict=True):
        image = _draw_counts(axes, np.array(found["confusion"]), labels, style)
        title = f"{part}: accuracy {found['accuracy']:.3f}"
        axes.set_title(title, fontsize=10, parse_math=False)
    name = name if len(name) <= 40 else f"\N{HORIZONTAL ELLIPSIS}{name[-39:]}"
    figure.suptitle(name, fontsize=10, parse_math=False)
    figure.colorbar(image, ax=panels, label="share of the true label", shrink=0.8)
    options: dict[str, Any] = {"format": "png", "dpi": 120, "bbox_inches": "tight"}
    replace_file(path, lambda tmp_path: figure.savefig(tmp_path, **options))


def _draw_counts(
    axes: Any, counts_KK: np.ndarray, labels: list[str], style: dict[str, Any]
) -> Any:
    """Draws a confusion matrix, with its numbers if there are few labels."""
    K, totals_K1 = len(labels), counts_KK.sum(axis=1, keepdims=True)
    shares_KK = counts_KK / np.maximum(totals_K1, 1)
    image = axes.imshow(shares_KK, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(K), labels, rotation="vertical" if K > 3 else None, **style)
    axes.set_yticks(range(K), labels, **style)
    axes.set(xlabel="predicted", ylabel="true")
    for (row, column), count in np.ndenumerate(counts_KK if K <= _MOST_SHOWN else []):
        share = shares_KK[row, column]
        colour = "white" if share > 0.5 else "black"
        text = f"{count:,}\n{share:.0%}"
        axes.text(column, row, text, ha="center", va="center", color=colour)
    return image
