import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TINY, changed

from jaxgpt.models.layers import Attention, Block
from jaxgpt.ops.attention import Mask

B, T, S = 2, 4, 7
CONFIG = changed(TINY, model={"bias": True, "dropout": 0.0}).model
C, H, D = CONFIG.n_embd, CONFIG.n_head, CONFIG.head_dim
LENGTHS_B = np.array([7, 3])


def cross_attend(attention, x_BTC, memory_BSC):
    """To all of a padded memory, whose keys and values are computed once."""
    mask = Mask(causal=False, lengths_B=LENGTHS_B)
    return attention(x_BTC, mask, memory=attention.keys_and_values(memory_BSC))[0]


@pytest.fixture(scope="module")
def cross():
    """Attention, its parameters for a memory, x and the memory."""
    x_BTC, memory_BSC = (
        jax.random.normal(jax.random.key(n), (B, n, C)) for n in (T, S)
    )
    attention = Attention(CONFIG, "cpu")
    variables = attention.init(
        jax.random.key(0), x_BTC, memory_BSC, method=cross_attend
    )
    params = jax.tree.map(lambda a: 8 * a, variables["params"])
    params["c_attn"]["bias"] += 0.5
    return attention, params, x_BTC, memory_BSC


def test_attention_to_a_memory_is_pytorchs_multi_head_attention(cross):
    attention, params, x_BTC, memory_BSC = cross
    reference = torch.nn.MultiheadAttention(C, H, batch_first=True)
    packed, out = params["c_attn"], params["c_proj"]
    state = {
        "in_proj_weight": packed["kernel"].reshape(C, 3 * C).T,
        "in_proj_bias": packed["bias"].ravel(),
        "out_proj.weight": out["kernel"].reshape(C, C).T,
        "out_proj.bias": out["bias"],
    }
    reference.load_state_dict(
        {name: torch.tensor(np.array(a)) for name, a in state.items()}
    )
    x, memory = (torch.tensor(np.asarray(a)) for a in (x_BTC, memory_BSC))
    padding = torch.tensor(np.arange(S) >= LENGTHS_B[:, None])
    expected, _ = reference(x, memory, memory, key_padding_mask=padding)
    found = attention.apply({"params": params}, x_BTC, memory_BSC, method=cross_attend)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_memory_is_read_once_for_many_queries(cross):
    attention, params, x_BTC, memory_BSC = cross
    variables, mask = {"params": params}, Mask(False, lengths_B=LENGTHS_B)
    whole = attention.apply(variables, x_BTC, memory_BSC, method=cross_attend)
    memory = attention.apply(variables, memory_BSC, method="keys_and_values")
    for t in range(T):
        one, _ = attention.apply(variables, x_BTC[:, t : t + 1], mask, memory=memory)
        np.testing.assert_allclose(one[:, 0], whole[:, t], rtol=1e-5, atol=1e-5)


def test_a_block_computes_the_positions_that_are_asked_for_as_among_all():
    block, x_BTC = Block(CONFIG, "cpu"), jax.random.normal(jax.random.key(1), (B, T, C))
    variables = block.init(jax.random.key(0), x_BTC, Mask())
    whole, _ = block.apply(variables, x_BTC, Mask())
    last_B = jnp.array([2, 0])
    mask = Mask(positions_BT=last_B[:, None])
    last, _ = block.apply(variables, x_BTC, mask, last_B=last_B)
    np.testing.assert_allclose(last[:, 0], whole[jnp.arange(B), last_B], atol=2e-6)
