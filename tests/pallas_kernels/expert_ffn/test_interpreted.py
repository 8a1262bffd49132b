"""The expert kernel's ring, index maps and division of work, interpreted against the oracle.

In one launch, as the interpreter runs it: block after block, so twice, the second time with the
hidden values of the first. Memory that nobody wrote is NaN in the interpreter, so that every result
here also shows that each element was written.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_cases import distance, oracle, random_experts, random_routing
from jax.experimental import pallas as pl

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from pallas_kernels.expert_ffn import (  # noqa: E402
    block,
    expert_ffn,
    flow,
    interpreted,
    layout,
    mosaic_gpu,
    ring,
    slots,
)
from pallas_kernels.expert_ffn.shapes import SHAPES  # noqa: E402

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11, 2), reason="the Mosaic GPU kernels need jax >= 0.11.2"
)
D, F, EXPERTS, CHOICES = 256, 64, 5, 2
# Two warpgroups. Two slices of two parts, two units; two units whose stages are half as large.
PLANS = layout.Plan(2 * F, D, 4, 2, 2), layout.Plan(D, F, 8, 1, 1)
TOLERANCE = 5e-3
# More blocks than some experts have units, fewer stages than a unit has parts in flight.
TWO = mosaic_gpu.Launch(ctas=3, stages=2, fused=False)
ONE = mosaic_gpu.Launch(ctas=3, stages=3, fused=True)
ONE_STAGE = dataclasses.replace(ONE, stages=1)


@functools.partial(jax.jit, static_argnames=("hooks", "launch"))
def _run(x, packed, ids, routing, hooks, launch):
    return mosaic_gpu.expert_ffn_mosaic(
        x, packed, ids, routing, launch=launch, hooks=hooks, interpret=plgpu.InterpretGPUParams()
    )


def run(x, weights, ids, routing, hooks=interpreted.Interpreted, launch=ONE, plans=PLANS):
    packed = layout.pack_experts(weights, *plans)
    return np.asarray(_run(x, packed, jnp.asarray(ids), jnp.asarray(routing), hooks, launch))


def tokens(rng, t):
    return jnp.asarray(rng.normal(size=(t, D)), jnp.bfloat16)


@pytest.mark.parametrize(
    ("t", "experts", "launch"),
    [
        (4, EXPERTS, ONE),
        (10, 2, TWO),
        *(
            pytest.param(t, experts, launch, marks=pytest.mark.slow)
            for t, experts, launch in (
                (8, EXPERTS, ONE),
                (4, EXPERTS, dataclasses.replace(ONE, stages=7, ctas=1)),
                (8, EXPERTS, dataclasses.replace(ONE, runs=2)),
                (4, EXPERTS, TWO),
                (10, 2, dataclasses.replace(TWO, own_list=True)),
                (4, EXPERTS, dataclasses.replace(TWO, ahead=False)),
            )
        ),
    ],
)
def test_matches_the_oracle(t, experts, launch, rng):
    """With a dead choice, a double one and, for many tokens, experts of several slots."""
    weights = random_experts(rng, experts, D, F)
    ids, routing = random_routing(rng, t, CHOICES, experts)
    ids[0, 0], ids[1, 0], ids[2, 1] = experts, ids[1, 1], -1
    x = tokens(rng, t)
    out = run(x, weights, ids, routing, launch=launch)
    assert distance(out, oracle(x, weights, ids, routing)) < TOLERANCE
    # The reference rounds hidden values where the kernel does: what is left is the order of sums.
    arrays = jnp.asarray(ids), jnp.asarray(routing)
    reference = expert_ffn(x, weights, *arrays, implementation="reference")
    assert distance(out, np.asarray(reference)) < 2e-4


@pytest.mark.parametrize("warps", [8, 16])
def test_rows_follow_the_first_unit_where_no_claim_fits_the_ring(warps, rng):
    """A claim of more stages than the ring has; sixteen warps do not load ahead. As Flash's."""
    plans = layout.Plan(8 * F, 2 * D, warps // 2, 2, 2), layout.Plan(2 * D, 4 * F, warps, 1, 2)
    made = flow.Flow(*plans, (None, None), None, 1, 132, ONE.stages, False)
    assert not made.may_lag and made.run_units * plans[1].parts > ONE.stages
    assert made.loads_ahead == (warps == 8)
    weights = random_experts(rng, EXPERTS, 2 * D, 4 * F)
    ids, routing = random_routing(rng, 4, CHOICES, EXPERTS)
    x = jnp.asarray(rng.normal(size=(4, 2 * D)), jnp.bfloat16)
    out = run(x, weights, ids, routing, plans=plans)
    assert distance(out, oracle(x, weights, ids, routing)) < TOLERANCE


def test_a_ring_too_small_for_a_unit_is_refused(rng):
    """Its rows are asked for after its first unit: the producer would wait for ever."""
    plans = layout.Plan(4 * F, D, 4, 2, 2), layout.Plan(D, 2 * F, 8, 1, 2)
    weights = random_experts(rng, EXPERTS, D, 2 * F)
    ids, routing = random_routing(rng, 4, CHOICES, EXPERTS)
    with pytest.raises(ValueError, match="stages=1 do not hold .* give at least 2"):
        run(tokens(rng, 4), weights, ids, routing, launch=ONE_STAGE, plans=plans)


@pytest.mark.slow
@pytest.mark.parametrize("t", [4, 8])
def test_one_launch_and_two_give_the_same_bits(t, rng):
    weights = random_experts(rng, EXPERTS, D, F)
    ids, routing = random_routing(rng, t, CHOICES, EXPERTS)
    x = tokens(rng, t)
    np.testing.assert_array_equal(
        *(run(x, weights, ids, routing, launch=launch) for launch in (ONE, TWO))
    )


def test_all_codes_under_all_scales(rng):
    """Scales 2^-20 to 2^10: results of many sizes, so that rows are compared one by one."""
    weights = random_experts(rng, EXPERTS, D, F, scales=(107, 138))
    for codes, scales in (
        (weights.gate_up, weights.gate_up_scale),
        (weights.down, weights.down_scale),
    ):
        assert len(np.unique(np.asarray(codes) & 15)) == 16
        assert len(np.unique(scales)) == 31
    ids, routing = random_routing(rng, 4, CHOICES, EXPERTS)
    # Sums of at most some thousands: silu must not be all 0 or all linear.
    x = (tokens(rng, 4).astype(jnp.float32) * 2.0**-12).astype(jnp.bfloat16)
    out, expected = run(x, weights, ids, routing), oracle(x, weights, ids, routing)
    assert all(distance(row, wanted) < TOLERANCE for row, wanted in zip(out, expected, strict=True))


def test_a_row_minds_its_own_business(rng):
    """Its bits stay in another slot, beside rows with other experts, its choices swapped."""
    weights = random_experts(rng, EXPERTS, D, F)
    ids, routing = random_routing(rng, 4, CHOICES, EXPERTS)
    x = tokens(rng, 4)
    first = run(x, weights, ids, routing)
    others, shares = random_routing(rng, 4, CHOICES, EXPERTS)
    others[3], shares[3] = ids[0, ::-1], routing[0, ::-1]
    others[1] = EXPERTS
    second = run(tokens(rng, 4).at[3].set(x[0]), weights, others, shares)
    np.testing.assert_array_equal(second[3], first[0])
    np.testing.assert_array_equal(second[1], 0)


@pytest.mark.parametrize(
    "launch", [ONE, pytest.param(TWO, marks=pytest.mark.slow)], ids=["one", "two"]
)
def test_sums_are_rounded_once_a_residual_in_them(launch, rng):
    weights = random_experts(rng, EXPERTS, D, F)
    ids, routing = map(jnp.asarray, random_routing(rng, 4, CHOICES, EXPERTS))
    x, residual = tokens(rng, 4), tokens(rng, 4)
    packed, options = layout.pack_experts(weights, *PLANS), dict(launch=launch)
    options["interpret"] = plgpu.InterpretGPUParams()
    y, rounded, added = (
        mosaic_gpu.expert_ffn_mosaic(x, packed, ids, routing, more, out_dtype=kind, **options)
        for more, kind in ((None, None), (None, jnp.bfloat16), (residual, None))
    )
    assert (y.dtype, rounded.dtype, added.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_array_equal(rounded, y.astype(jnp.bfloat16))
    wanted = (residual.astype(jnp.float32) + y).astype(jnp.bfloat16)
    np.testing.assert_array_equal(added, wanted)


def test_no_active_expert_gives_zeros(rng):
    weights = random_experts(rng, EXPERTS, D, F)
    ids = np.full((4, CHOICES), EXPERTS, np.int32)
    ids[1] = -1
    out = run(tokens(rng, 4), weights, ids, np.ones((4, CHOICES), np.float32))
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize(
    ("rows", "columns", "stages"),
    [(512, 6144, 3), (6144, 256, 3), (4096, 6144, 8), (512, 4096, 3), (512, 256, 12)],
)
def test_a_short_matrix_gets_a_short_ring(rows, columns, stages):
    assert block.default_stages(layout.plan_for(rows, columns)) == stages


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_both_passes_of_all_shapes_fit_one_launch(name):
    shape = SHAPES[name]
    up, down = layout.plan_for(2 * shape.f, shape.d), layout.plan_for(shape.d, shape.f)
    assert ring.flow_misfit(up, down, 8, shape.c, shape.e) is None
    listed = ring.list_bytes(slots.most_slots(8, shape.c, shape.e))
    stages = ring.flow_stages(up, down, listed)
    made = flow.Flow(up, down, (None, None), None, 1, 132, stages, False)
    # Whole experts of Flash, all of them in the list, have room for three of a claim's four stages.
    assert made.may_lag == (name != "flash")


@pytest.mark.parametrize("name", sorted(SHAPES))
@pytest.mark.parametrize("stages", [2, 3, 7, 12])
def test_weights_that_wait_for_no_rows_fit_the_ring(name, stages):
    """Else the producer would wait for consumers that wait for rows that it has yet to copy."""
    shape = SHAPES[name]
    down = layout.plan_for(shape.d, shape.f)
    up = layout.plan_for(2 * shape.f, shape.d)
    made = flow.Flow(up, down, (None, None), None, 1, 132, stages, False)
    claim = made.run_units * down.parts
    assert made.may_lag * claim <= stages
    assert made.buffers >= 2 and (made.buffers - 1) * claim <= max(stages, claim)
    assert down.units % made.run_units == 0


def test_what_does_not_go_together_is_refused_one_launch():
    up, sixteen = layout.Plan(512, 6144, 1, 12, 2), layout.Plan(6144, 256, 16, 1, 1)
    down = layout.plan_for(6144, 256)
    assert "12 and 16 warps" in ring.flow_misfit(up, sixteen, 8, 8, 384)
    assert "9 tokens of 8 choices" in ring.flow_misfit(up, down, 9, 8, 384)
    assert ring.flow_misfit(up, down, 8, 8, 384) is None


def test_blocks_divide_the_units_evenly():
    """Contiguous, each unit once, and no block has more than one unit more than another."""
    ctas = 132
    for total in (0, 1, 131, 256, 1888, 2**20 + 5):
        bounds = [total * n // ctas for n in range(ctas + 1)]
        shares = np.diff(bounds)
        assert bounds[0] == 0 and bounds[-1] == total
        assert shares.max() - shares.min() <= 1


def test_blocks_that_wait_for_each_other_need_an_sm_each(monkeypatch):
    device = types.SimpleNamespace(platform="gpu", core_count=78, device_kind="NVIDIA H20")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    with pytest.raises(ValueError, match="132 thread blocks .* NVIDIA H20 has 78"):
        mosaic_gpu._check_resident(mosaic_gpu.Launch(fused=True))
    mosaic_gpu._check_resident(mosaic_gpu.Launch(fused=True, ctas=78))
    assert mosaic_gpu.default_launch().ctas == 78


def test_what_needs_one_launch_is_refused_for_two():
    with pytest.raises(ValueError, match="needs fused=True"):
        mosaic_gpu.Launch(time_line=True, fused=False)


class LosesAUnit(interpreted.Interpreted):
    """A planted bug: the first unit of every slot is not written."""

    def finish(self, sums_ref, row_ref, share_ref, out_ref, slot, unit):
        arguments = self, sums_ref, row_ref, share_ref, out_ref, slot, unit
        pl.when(unit > 0)(lambda: interpreted.Interpreted.finish(*arguments))


class SwapsRows(interpreted.Interpreted):
    """A planted bug: hidden rows of two tokens are taken for each other's."""

    def held(self, rows_ref, group):
        rows = interpreted.Interpreted.held(self, rows_ref, group)
        return jnp.concatenate([rows[:, 1::-1], rows[:, 2:]], axis=1)


class SwapsSlices(interpreted.Interpreted):
    """A planted bug: warps of a row take each other's columns of x."""

    def fetch(self, x_ref, row_ref, slot, group):
        x = interpreted.Interpreted.fetch(self, x_ref, row_ref, slot, group)
        return jnp.stack([x[1], x[0], x[3], x[2]])


@pytest.mark.parametrize("bug", [LosesAUnit, SwapsRows, SwapsSlices])
def test_a_planted_bug_is_seen(bug, rng):
    weights = random_experts(rng, EXPERTS, D, F)
    ids, routing = random_routing(rng, 4, CHOICES, EXPERTS)
    x = tokens(rng, 4)
    out = run(x, weights, ids, routing, hooks=bug)
    assert not distance(out, oracle(x, weights, ids, routing)) < 10 * TOLERANCE


def slow_slots(ids, routing, experts):
    """(expert, {lane: (token, row of the results, share)}) of each slot; tokens' live rows."""
    t, k = ids.shape
    slots, live = [], []
    for token in range(t):
        live.append(sorted({int(e) for e in ids[token] if 0 <= e < experts}))
    for expert in range(experts):
        users = [token for token in range(t) if expert in live[token]]
        for start in range(0, len(users), 8):
            rows = {
                token if t <= 8 else lane: (
                    token,
                    token * k + live[token].index(expert),
                    routing[token, ids[token] == expert].sum(),
                )
                for lane, token in enumerate(users[start : start + 8])
            }
            slots.append((expert, rows))
    return slots, [len(experts) for experts in live]


@pytest.mark.parametrize(("t", "k", "experts"), [(1, 5, 11), (8, 4, 9), (13, 3, 200), (70, 4, 6)])
def test_slots_list_distinct_experts_with_their_tokens(t, k, experts, rng):
    ids = rng.integers(-1, experts + 1, (t, k)).astype(np.int32)
    routing = rng.random((t, k)).astype(np.float32)
    found = jax.jit(slots.make_slots, static_argnums=2)(ids, routing, experts)
    expected, live = slow_slots(ids, routing, experts)
    assert int(found.count[-1]) == len(expected)
    assert list(found.live) == list(slots.live_choices(jnp.asarray(ids), experts)) == live
    for slot, (expert, rows) in enumerate(expected):
        assert int(found.expert[slot]) == expert
        for lane in range(8):
            token, row, share = rows.get(lane, (-1, -1, 0.0))
            assert int(found.token[slot, lane]) == token
            assert int(found.choice[slot, lane]) == row
            np.testing.assert_allclose(found.share[slot, lane], share, rtol=1e-6)
    assert (np.asarray(found.token)[len(expected) :] == -1).all()
    assert ((0 <= np.asarray(found.expert)) & (np.asarray(found.expert) < experts)).all()
