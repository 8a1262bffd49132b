"""Variants of the expert kernel's hooks for benchmarks: what does a part of the work cost?"""

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import carriers, ptx
from pallas_kernels.expert_ffn.lanes import Lanes, zeros


def folded(plan, swiglu, **options):
    """Scales multiplied into the weights instead of the sums."""
    return Lanes(plan, swiglu, fold=True, **options)


@dataclasses.dataclass(frozen=True)
class Stream(Lanes):
    """Moves every byte and computes nothing: the ring's own speed. Its results are zeros."""

    def load(self, stage_ref, group):
        """Leaves the stage unread."""

        @plgpu.inline_mgpu(arg_types=(), return_type=carriers.carried(self._held_words, jnp.int32))
        def run(_):
            return carriers.carry_values([ptx.int32(0)] * self._held_words, signed=True)

        return run()

    def multiply(self, sums, x, part, loaded, ahead=None):
        """Zeros."""

        @plgpu.inline_mgpu(arg_types=(), return_type=carriers.carried(4, jnp.float32))
        def run(_):
            return zeros()

        return run()
