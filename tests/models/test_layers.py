import jax
import numpy as np
import pytest
import torch
from conftest import TINY, changed

from jaxgpt.models.layers import Attention, Block
from jaxgpt.ops.attention import Mask

B, T, S = 2, 4, 7
CONFIG = changed(TINY, model={"bias": True, "dropout": 0.0}).model
C, H = CONFIG.n_embd, CONFIG.n_head
LENGTHS_B = np.array([7, 3])
MASK = Mask(causal=False, lengths_B=LENGTHS_B)
X_BTC, MEMORY_BSC = (
    np.random.default_rng(n).normal(size=(B, n, C)).astype(np.float32) for n in (T, S)
)


def cross_attend(attention, x_BTC, memory_BSC):
    """To all of a padded memory, whose keys and values are computed once."""
    return attention(x_BTC, MASK, memory=attention.keys_and_values(memory_BSC))[0]


@pytest.fixture(scope="module")
def cross():
    """Attention, its parameters for a memory, and what x attends to there."""
    attention = Attention(CONFIG, "cpu")
    key = jax.random.key(0)
    variables = attention.init(key, X_BTC, MEMORY_BSC, method=cross_attend)
    params = jax.tree.map(lambda a: 8 * a, variables["params"])
    params["c_attn"]["bias"] += 0.5
    out = attention.apply({"params": params}, X_BTC, MEMORY_BSC, method=cross_attend)
    return attention, params, out


def test_attention_to_a_memory_is_pytorchs_multi_head_attention(cross):
    _, params, found = cross
    packed, out = params["c_attn"], params["c_proj"]
    state = {
        "in_proj_weight": packed["kernel"].reshape(C, 3 * C).T,
        "in_proj_bias": packed["bias"].ravel(),
        "out_proj.weight": out["kernel"].reshape(C, C).T,
        "out_proj.bias": out["bias"],
    }
    reference = torch.nn.MultiheadAttention(C, H, batch_first=True)
    reference.load_state_dict({k: torch.tensor(np.array(a)) for k, a in state.items()})
    x, memory = torch.tensor(X_BTC), torch.tensor(MEMORY_BSC)
    padding = torch.tensor(np.arange(S) >= LENGTHS_B[:, None])
    expected, _ = reference(x, memory, memory, key_padding_mask=padding)
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5, atol=1e-5)


def test_keys_and_values_of_a_memory_serve_later_queries(cross):
    attention, params, whole = cross
    variables = {"params": params}
    memory = attention.apply(variables, MEMORY_BSC, method="keys_and_values")
    for t in range(T):
        one, _ = attention.apply(variables, X_BTC[:, t : t + 1], MASK, memory=memory)
        np.testing.assert_allclose(one[:, 0], whole[:, t], rtol=1e-5, atol=1e-5)


def test_a_block_computes_a_single_position_as_among_all():
    block, last_B = Block(CONFIG, "cpu"), np.array([2, 0])
    apply = jax.jit(block.apply)
    variables = jax.jit(block.init)(jax.random.key(0), X_BTC, Mask())
    whole, _ = apply(variables, X_BTC, Mask())
    mask = Mask(positions_BT=last_B[:, None])
    last, _ = apply(variables, X_BTC, mask, last_B=last_B)
    np.testing.assert_allclose(last[:, 0], whole[np.arange(B), last_B], atol=2e-6)
