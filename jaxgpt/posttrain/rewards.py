"""Rewards of responses: by a reward model, or by a function in code.

B responses
"""

from typing import Any

import numpy as np
from jax import Array

from jaxgpt.posttrain.rollout import Rollout, in_batches
from jaxgpt.run import Run


def score(run: Run, rolled: Rollout) -> np.ndarray:
    """The reward model's score of each response, f32 [B], on the host."""

    def scores(params: Any, rolled: Rollout) -> Array:
        inputs = rolled.tokens_BT, rolled.lengths()
        found_B: Array = run.model.apply({"params": params}, *inputs)
        return found_B

    return in_batches(scores, run, rolled)
