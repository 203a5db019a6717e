import jax
import jax.numpy as jnp
import numpy as np
from conftest import TINY, changed

from jaxgpt.models import build_model


def test_the_bigram_model_is_a_table_of_logits():
    model = build_model(changed(TINY, model={"architecture": "bigram"}).model)
    tokens = jnp.array([[3, 1, 3], [1, 0, 10]])
    params = model.init(jax.random.key(0), tokens)["params"]
    table = params["table"]["embedding"]
    assert table.shape == (11, 11)
    assert 0.8 < table.std() < 1.2  # PyTorch's N(0, 1), as in the lecture
    np.testing.assert_array_equal(
        model.apply({"params": params}, tokens), table[tokens]
    )
