"""The residual connection.

B batch   T time   C n_embd
"""

import jax
from jax import Array


def residual(x_BTC: Array, branch_BTC: Array, platform: str) -> Array:
    """x + branch."""
    if platform in ("cuda", "gpu"):
        # XLA would let the branch's last matmul add to a copy of x. A separate addition
        # fuses with the LayerNorm that follows, and needs no copy.
        branch_BTC = jax.lax.optimization_barrier(branch_BTC)
    return x_BTC + branch_BTC
