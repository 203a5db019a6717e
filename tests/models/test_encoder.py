"""What holds for the models that are trained on examples."""

import jax
import numpy as np
import pytest
from conftest import EXAMPLE_KINDS, changed, random_examples, random_params

from jaxgpt.models import build_model
from jaxgpt.text.examples import row_keys
from jaxgpt.training.objectives import Context, make_objective


@pytest.mark.parametrize(
    ("architecture", "dropout"),
    [
        *((architecture, 0.0) for architecture in EXAMPLE_KINDS),
        ("classifier", 0.3),
        pytest.param("masked-lm", 0.3, marks=pytest.mark.slow),
        pytest.param("seq2seq", 0.3, marks=pytest.mark.slow),
    ],
)
def test_padding_changes_neither_losses_nor_gradients(architecture, dropout):
    examples, config = random_examples(architecture, [5, 5, 16])
    config = changed(config, model={"dropout": dropout})
    model = build_model(config.model, "cpu")
    params, objective = random_params(model, std=0.3), make_objective(model, config.dpo)
    key = jax.random.key(1) if dropout else None

    @jax.jit
    def of_batch(batch, rows):
        def loss(params):
            total, _ = objective(params, batch, Context(key, rows))
            return total.total, total.weight

        return jax.value_and_grad(loss, has_aux=True)(params)

    def of_rows(rows, T):
        rows = np.array(rows)
        weights, keys = np.ones(len(rows), np.float32), row_keys(5, rows)
        return of_batch(examples.read(rows, T, weights, keys), rows)

    alone = [of_rows([row], length) for row, length in enumerate([5, 5, 16])]
    expected = jax.tree.map(lambda *leaves: sum(leaves), *alone)
    found = of_rows([0, 1, 2], 16)
    scale = max(abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    assert scale > 0.1
    for one, other in zip(*map(jax.tree.leaves, (expected, found)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5 * scale)
