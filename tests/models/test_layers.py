from functools import partial

import jax
import numpy as np
import torch
from conftest import build, random_params

from jaxgpt.models.layers import Attention
from jaxgpt.ops.attention import Mask


def test_attention_to_a_padded_memory_is_pytorchs_multi_head_attention():
    model = build(bias=True)
    config = model.config
    T, S, C, lengths_B = 4, 7, config.n_embd, np.array([7, 3])
    rng = np.random.default_rng(0)
    x_BTC, memory_BSC = (rng.normal(size=(2, n, C)).astype(np.float32) for n in (T, S))
    stack = random_params(model, mean=0, std=0.3)["h"]["attn"]
    params = jax.tree.map(lambda a: a[0], stack)
    packed, out = params["c_attn"], params["c_proj"]
    reference = torch.nn.MultiheadAttention(C, config.n_head, batch_first=True)
    state = {
        "in_proj_weight": packed["kernel"].reshape(C, 3 * C).T,
        "in_proj_bias": packed["bias"].ravel(),
        "out_proj.weight": out["kernel"].reshape(C, C).T,
        "out_proj.bias": out["bias"],
    }
    reference.load_state_dict({name: torch.tensor(a) for name, a in state.items()})
    x, memory = torch.tensor(x_BTC), torch.tensor(memory_BSC)
    padding = torch.tensor(np.arange(S) >= lengths_B[:, None])
    expected, _ = reference(x, memory, memory, key_padding_mask=padding)

    apply = partial(Attention(config, "cpu").apply, {"params": params})
    mask = Mask(causal=False, lengths_B=lengths_B)
    keys_and_values = apply(memory_BSC, method="keys_and_values")  # once for all
    whole, _ = apply(x_BTC, mask, memory=keys_and_values)
    np.testing.assert_allclose(whole, expected.detach(), rtol=1e-5, atol=1e-5)
    for t in range(T):
        one_B1C, _ = apply(x_BTC[:, t : t + 1], mask, memory=keys_and_values)
        np.testing.assert_allclose(
            one_B1C[:, 0], expected[:, t].detach(), rtol=1e-5, atol=1e-5
        )
