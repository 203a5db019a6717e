"""Sampling of the next token from logits.

B batch   V vocab   K top_k
"""

import jax
import jax.numpy as jnp

from jaxgpt.config import SamplingConfig


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, config: SamplingConfig
) -> jax.Array:
    """Samples one token per row, i32 [B].

    Args:
      logits_BV: f32.
      keys_B: one PRNG key per row, so that a row's token does not depend on the others.
    """
    return jnp.argmax(scores(logits_BV, keys_B, config), axis=-1).astype(jnp.int32)


def scores(
    logits_BV: jax.Array, keys_B: jax.Array, config: SamplingConfig
) -> jax.Array:
    """Scores whose argmax is the sampled token, f32 [B, V]; -inf for excluded tokens.

    Source: the Gumbel-max trick. The argmax of logits plus Gumbel noise is a sample
    from their softmax.
    """
    if config.temperature == 0:
        return logits_BV
    logits_BV -= logits_BV.max(axis=-1, keepdims=True)  # avoids overflow
    temperature = max(config.temperature, float(jnp.finfo(jnp.float32).tiny))
    logits_BV = filter_logits(logits_BV / temperature, config)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
    return logits_BV + noise_BV


def filter_logits(logits_BV: jax.Array, config: SamplingConfig) -> jax.Array:
    """Sets logits outside top_k, then top_p, to -inf; keeps ties with the lowest.

    Source: Fan et al. 2018, section 5.4 (top-k); Holtzman et al. 2020, section 3.1
    (top-p, the nucleus).
    """
    if config.top_k is not None:
        top_BK, _ = jax.lax.top_k(logits_BV, min(config.top_k, logits_BV.shape[-1]))
        logits_BV = jnp.where(logits_BV < top_BK[:, -1:], -jnp.inf, logits_BV)
    if config.top_p is not None:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        kept_BV = jnp.where(before_BV < config.top_p, sorted_BV, jnp.inf)
        lowest_B1 = kept_BV.min(axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
    return logits_BV
