"""The attention layer's ring of stages, order and division of work, interpreted.

Memory that nobody wrote is NaN in the interpreter, so that every result here also shows that each
element was written.
"""

import jax
import jax.numpy as jnp
import pytest

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from attention_layer_cases import Shape, distance, make, options  # noqa: E402

from pallas_kernels.attention.reference import block_attention_reference  # noqa: E402
from pallas_kernels.attention_layer.interpreted import Together  # noqa: E402
from pallas_kernels.attention_layer.mosaic_gpu import attention_layer_mosaic  # noqa: E402
from pallas_kernels.linear import block  # noqa: E402
from pallas_kernels.linear.interpreted import Interpreted  # noqa: E402
from pallas_kernels.linear.plan import Plan  # noqa: E402
from pallas_kernels.linear.reference import linear_reference  # noqa: E402

SHAPE, B, T = Shape(256, 4, 1, 48, 32, 8, 24), 1, 3
# Blocks of other numbers than each other's, last steps of few rows, rows that two blocks share.
PLANS = (
    Plan(SHAPE.rows, SHAPE.d, 2, 1, 4, 2, 1, ctas=6),
    Plan(SHAPE.d, SHAPE.n * SHAPE.v, 2, 1, 4, 1, 1, ctas=5),
)
TOLERANCE = 5e-3
NAMES = ("qkv", "heads", "y")


def run(arguments, hooks=(Interpreted, Together), stream=False):
    """Three launches, each of which reads what the one before wrote; a ring of three stages."""
    given = options(SHAPE, stream=stream, flags=SHAPE.flags, plans=PLANS, stages=3, hooks=hooks)
    given |= dict(interpret=plgpu.InterpretGPUParams())
    seen = dict(qkv_seen=(1, B * T, SHAPE.rows), heads_seen=(B * T, SHAPE.n * SHAPE.v))
    seen = {name: jnp.zeros(shape, jnp.bfloat16) for name, shape in seen.items()}
    for _ in range(3):
        found, *_ = attention_layer_mosaic(**arguments, **given, seen=seen)
        seen = dict(qkv_seen=found["qkv"], heads_seen=found["heads"])
    return [found[name] for name in NAMES]


def reference(a):
    """What each part writes."""
    rows = a["h"].reshape(B * T, SHAPE.d)
    product = linear_reference(rows, a["qkv"], None, a["norm"], 1e-5, out_dtype=jnp.bfloat16)
    names = ("cos", "sin", "keys", "values", "start", "live", "sink")
    held = [a[name] for name in names]
    more = dict(window=SHAPE.window, value_scale=0.707)
    heads, *_ = block_attention_reference(product.reshape(B, T, SHAPE.k, -1), *held, **more)
    heads = heads.astype(jnp.bfloat16).reshape(B * T, SHAPE.n * SHAPE.v)
    return product, heads, linear_reference(heads, a["output"], out_dtype=jnp.bfloat16)


@pytest.mark.parametrize("early", [0, block.EARLY_BYTES])
def test_each_part_matches_its_reference(early, rng, monkeypatch):
    """Whether copies wait for x, all but the first, or are so few that none does."""
    monkeypatch.setattr(block, "EARLY_BYTES", early)
    attention_layer_mosaic.clear_cache()
    arguments = make(rng, SHAPE, B, T, 41, T)
    for name, out, ref in zip(NAMES, run(arguments), reference(arguments), strict=True):
        assert distance(out.reshape(ref.shape), ref) < TOLERANCE, name


def test_the_stream_is_added_to_what_is_projected(rng):
    arguments = make(rng, SHAPE, B, T, 41, T)
    out, rows = run(arguments, stream=True)[-1], arguments["h"].reshape(B * T, SHAPE.d)
    wanted = rows.astype(jnp.float32) + reference(arguments)[-1].astype(jnp.float32)
    assert distance(out.reshape(wanted.shape), wanted) < TOLERANCE


class LosesAStep(Interpreted):
    """A planted bug: rows of the output projection are written from another block's."""

    def finish(self, sums_ref, out_ref, first_row, *rest):
        shift = self.plan.columns == SHAPE.n * SHAPE.v
        Interpreted.finish(
            self, sums_ref, out_ref, jnp.maximum(first_row - jnp.int32(shift), 0), *rest
        )


class AttendsTwice(Together):
    """A planted bug: every block that attends takes the first tile."""

    def attend(self, ring, refs, block):
        Together.attend(self, ring, refs, block * 0)


@pytest.mark.parametrize("hooks", [(LosesAStep, Together), (Interpreted, AttendsTwice)])
def test_a_planted_bug_is_seen(hooks, rng):
    arguments = make(rng, SHAPE, B, T, 41, T)
    found = run(arguments, hooks)[-1]
    assert not distance(found.reshape(-1, SHAPE.d), reference(arguments)[-1]) < 10 * TOLERANCE
