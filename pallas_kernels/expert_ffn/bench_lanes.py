"""Variants of the expert kernel's hooks for benchmarks: what does a part of the work cost?"""

import dataclasses

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import carriers
from pallas_kernels.expert_ffn.lanes import Lanes, zeros


def folded(plan, swiglu, **options):
    """Scales multiplied into the weights instead of the sums."""
    return Lanes(plan, swiglu, fold=True, **options)


@dataclasses.dataclass(frozen=True)
class Stream(Lanes):
    """Moves every byte and computes nothing: the ring's own speed. Its results are zeros."""

    def multiply(self, sums, x, part, stage_ref, group, give_back):
        """Leaves the stage unread."""
        self.arrive(*give_back)

        @plgpu.inline_mgpu(arg_types=(), return_type=carriers.carried(4, jnp.float32))
        def run(_):
            return zeros()

        return run()
