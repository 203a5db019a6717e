"""The GPT once more, in NumPy and float64, one sequence and one head at a time.

Written from nanoGPT's definition, to check the model against.
"""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def gelu(x, kind):
    if kind == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def layer_norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p.get("bias", 0)


def softmax(x):
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def attention(x, p):
    _, _, n_head, head_dim = p["c_attn"]["kernel"].shape
    bias = p["c_attn"].get("bias", np.zeros((3, n_head, head_dim)))
    out = p["c_proj"].get("bias", 0)
    for head in range(n_head):
        q, k, v = (
            x @ p["c_attn"]["kernel"][:, i, head] + bias[i, head] for i in range(3)
        )
        scores = q @ k.T / math.sqrt(head_dim)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        out = out + softmax(scores) @ v @ p["c_proj"]["kernel"][head]
    return out


def mlp(x, p, kind):
    h = x @ p["c_fc"]["kernel"] + p["c_fc"].get("bias", 0)
    return gelu(h, kind) @ p["c_proj"]["kernel"] + p["c_proj"].get("bias", 0)


def logits(params, tokens, kind):
    """Logits [T, V] of one sequence of token ids."""
    embedding = params["wte"]["embedding"]
    x = embedding[tokens] + params["wpe"]["embedding"][: len(tokens)]
    n_layer = len(params["h"]["ln_1"]["scale"])
    for i in range(n_layer):
        block = _take(params["h"], i)
        x = x + attention(layer_norm(x, block["ln_1"]), block["attn"])
        x = x + mlp(layer_norm(x, block["ln_2"]), block["mlp"], kind)
    return layer_norm(x, params["ln_f"]) @ embedding.T


def _take(tree, i):
    """The parameters of layer `i` out of the stacked ones."""
    return {k: _take(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()}
