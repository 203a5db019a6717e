"""The report on a reward model, or on what DPO trained: how it judges pairs.

N pairs
"""

import math
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import Config
from jaxgpt.run import Run, load_initial_params, with_reference
from jaxgpt.terminal import progress
from jaxgpt.text.examples import Preferences
from jaxgpt.training.evaluation import pair_values, with_log_probs


def evaluate_preferences(
    run: Run, pairs: Preferences, config: Config, mesh: Mesh
) -> dict[str, Any]:
    """Measures the rewards of pairs; see `preference_metrics` for each figure.

    With DPO the reward is beta log(p / p_reference), which needs the reference.
    """
    if config.dpo:
        reference = load_initial_params(with_reference(config), mesh)
        pairs = with_log_probs(run.model, reference, config, mesh, pairs)
    with progress("evaluating", len(pairs)) as advance:
        values_N2 = pair_values(run.model, run.params, pairs, config, mesh, advance)
    if config.dpo:
        values_N2 = config.dpo.beta * (values_N2 - pairs.reference_N2)
    return preference_metrics(values_N2)


def preference_metrics(rewards_N2: np.ndarray) -> dict[str, Any]:
    """Measures how rewards agree with preferences, of which there is at least one.

    Args:
      rewards_N2: of the chosen and of the rejected text.

    Returns a dict of
      pairs: N.
      loss: mean of -log sigmoid(r_chosen - r_rejected), in nats per pair.
      accuracy: fraction of the pairs whose chosen text has the higher reward.
      accuracy_standard_error: of that fraction, sqrt(p (1 - p) / N).
      margin: mean of r_chosen - r_rejected.
      quartiles: by |r_chosen - r_rejected|, from the closest pairs to the clearest:
        the smallest and largest of these, `from` and `to`, and pairs and accuracy.
    """
    margin_N = rewards_N2[:, 0].astype(np.float64) - rewards_N2[:, 1]
    order_N = np.argsort(np.abs(margin_N), kind="stable")
    parts = [margin_N[rows] for rows in np.array_split(order_N, 4) if len(rows)]
    return {
        **_accuracy(margin_N),
        "loss": float(np.logaddexp(0, -margin_N).mean()),
        "margin": float(margin_N.mean()),
        "quartiles": [
            {"from": float(abs(part[0])), "to": float(abs(part[-1])), **_accuracy(part)}
            for part in parts
        ],
    }


def _accuracy(margin_N: np.ndarray) -> dict[str, Any]:
    count, accuracy = len(margin_N), float((margin_N > 0).mean())
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    return {"pairs": count, "accuracy": accuracy, "accuracy_standard_error": error}


def show_quartiles(report: dict[str, Any]) -> None:
    """Prints a line for each quartile."""
    for part in report["quartiles"]:
        print(
            f"difference {part['from']:.4f} to {part['to']:.4f}: "
            f"{part['pairs']} pairs, accuracy {part['accuracy']:.4f} "
            f"± {part['accuracy_standard_error']:.4f}"
        )
