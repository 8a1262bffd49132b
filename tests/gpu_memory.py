"""A GPU's memory, for tests that need one."""

import jax
import jax.numpy as jnp


def poison(gib: int = 1) -> None:
    """Memory that the next program gets holds NaN, so that what it leaves unwritten shows."""
    jax.block_until_ready(jnp.full(gib << 28, jnp.nan, jnp.float32)).delete()
