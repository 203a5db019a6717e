"""The lecture's models in NumPy and float64, one head and layer at a time.

Written from the lecture's definition, to check the models against.
"""

import jax
import numpy as np


def layer_norm(x, p):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def causal_attention(q, k, v):
    """The attention of one head, [T, D]."""
    scores = q @ k.T / np.sqrt(k.shape[1])
    scores[np.triu_indices(len(q), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def heads(x, p):
    """The outputs of all heads, concatenated."""
    kernels = zip(*(p[n]["kernel"] for n in ("query", "key", "value")), strict=True)
    each = [causal_attention(x @ q, x @ k, x @ v) for q, k, v in kernels]
    return np.concatenate(each, axis=1)


def block(x, p, architecture):
    if architecture == "attention":
        return heads(x, p["heads"])
    if architecture == "feed-forward":
        return np.maximum(linear(heads(x, p["sa"]["heads"]), p["ffwd"]), 0)
    normed = architecture == "layer-norm"
    h = layer_norm(x, p["ln1"]) if normed else x
    x = x + linear(heads(h, p["sa"]["multi_head"]["heads"]), p["sa"]["proj"])
    h = layer_norm(x, p["ln2"]) if normed else x
    return x + linear(np.maximum(linear(h, p["ffwd"]["fc"]), 0), p["ffwd"]["proj"])


def logits(params, tokens, architecture, n_layer):
    """Logits [T, V] of one sequence of token ids."""
    params = jax.tree.map(np.float64, params)
    x = params["token_embedding"]["embedding"][tokens]
    x = x + params["position_embedding"]["embedding"][: len(tokens)]
    for layer in range(n_layer):
        x = block(x, params[f"block_{layer}"], architecture)
    if architecture == "layer-norm":
        x = layer_norm(x, params["ln_f"])
    return linear(x, params["lm_head"])
