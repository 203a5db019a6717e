"""The GPT once more, in NumPy and float64, one sequence and one head at a time.

Written from nanoGPT's definition, to check the model against.
"""

import math

import jax
import numpy as np


def gelu(x, kind):
    if kind == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p.get("bias", 0)


def softmax(x):
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def causal_attention(q, k, v):
    """The attention of one head, [T, D]."""
    scores = q @ k.T / math.sqrt(k.shape[1])
    scores[np.triu_indices(len(q), 1)] = -np.inf
    return softmax(scores) @ v


def attention(x, p):
    kernel, out = p["c_attn"]["kernel"], p["c_proj"].get("bias", 0)
    bias = p["c_attn"].get("bias", np.zeros(kernel.shape[1:]))
    for head in range(kernel.shape[2]):
        qkv = (x @ kernel[:, i, head] + bias[i, head] for i in range(3))
        out = out + causal_attention(*qkv) @ p["c_proj"]["kernel"][head]
    return out


def mlp(x, p, kind):
    h = x @ p["c_fc"]["kernel"] + p["c_fc"].get("bias", 0)
    return gelu(h, kind) @ p["c_proj"]["kernel"] + p["c_proj"].get("bias", 0)


def logits(params, tokens, kind):
    """Logits [T, V] of one sequence of token ids."""
    params = jax.tree.map(np.float64, params)
    embedding = params["wte"]["embedding"]
    x = embedding[tokens] + params["wpe"]["embedding"][: len(tokens)]
    for i in range(len(params["h"]["ln_1"]["scale"])):
        block = jax.tree.map(lambda stack, i=i: stack[i], params["h"])
        x = x + attention(layer_norm(x, block["ln_1"]), block["attn"])
        x = x + mlp(layer_norm(x, block["ln_2"]), block["mlp"], kind)
    return layer_norm(x, params["ln_f"]) @ embedding.T
