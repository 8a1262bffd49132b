"""Router and experts in one launch, interpreted: what is chosen in it is what it multiplies."""

import jax
import numpy as np
import pytest
from expert_cases import distance
from moe_layer_cases import expected, make, options

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from pallas_kernels.expert_ffn import layout  # noqa: E402
from pallas_kernels.expert_ffn.block import Launch  # noqa: E402
from pallas_kernels.moe_layer.interpreted import FrontInterpreted  # noqa: E402
from pallas_kernels.moe_layer.mosaic_gpu import moe_layer_mosaic  # noqa: E402

D, F, EXPERTS, CHOICES = 256, 64, 32, 2
PLANS = layout.Plan(2 * F, D, 4, 2, 2), layout.Plan(D, F, 8, 1, 1)
LAUNCH = Launch(ctas=5, stages=3)
TOLERANCE = 5e-3


def run(given, front=None, **more):
    packed = layout.pack_experts(given["weights"], *PLANS)
    interpret = dict(interpret=plgpu.InterpretGPUParams(), launch=LAUNCH, front=front)
    found = moe_layer_mosaic(
        **given | dict(weights=packed), **options(CHOICES, **interpret, **more)
    )
    return np.asarray(found["y"], np.float64)


@pytest.mark.parametrize(("t", "stream", "wide"), [(4, False, True), (7, True, False)])
def test_matches_the_oracle(t, stream, wide, rng):
    given = make(rng, t, D, F, EXPERTS, CHOICES, wide)
    if not wide:
        given["live"] = None
    wanted = expected(given, CHOICES, stream)
    assert distance(run(given, stream=stream), wanted) < TOLERANCE


class NeighboursExperts(FrontInterpreted):
    """A planted bug: a token gets the experts of the one before it."""

    def chosen(self, hooks, refs):
        ids, weights = super().chosen(hooks, refs)
        return jax.numpy.roll(ids, 1, 0), weights


def test_a_planted_bug_is_seen(rng):
    given = make(rng, 4, D, F, EXPERTS, CHOICES)
    out = run(given, NeighboursExperts, stream=False)
    assert not distance(out, expected(given, CHOICES, stream=False)) < 10 * TOLERANCE
