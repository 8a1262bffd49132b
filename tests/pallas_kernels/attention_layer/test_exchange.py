"""The words that blocks leave for each other: their layout, and lane code on the emulator."""

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from lane_emulator import F32, U32, Memory, emulated  # noqa: E402

from pallas_kernels.attention_layer import exchange, lanes  # noqa: E402
from pallas_kernels.attention_layer.exchange import Exchange, Left  # noqa: E402
from pallas_kernels.linear import arithmetic, memory  # noqa: E402
from pallas_kernels.linear import lanes as linear_lanes  # noqa: E402
from pallas_kernels.linear.plan import Plan  # noqa: E402

BF16 = ml_dtypes.bfloat16
MODULES = lanes, linear_lanes, arithmetic, memory
BLOCKS = 7


def left(flags, turn, part, heads):
    """One of the two arrays, as the hooks are given it."""
    both = Memory(flags), Memory(np.array([turn], np.int32))
    if heads:
        return Left(*both, part.heads, part.half, part.columns)
    return Left(*both, part.halves, part.half, part.rows)


def half_of(flags, part, turn):
    """Its projection and its heads, [tokens, columns] each; 0xFFFF where nothing was left."""
    begin = part.halves + turn * part.half
    words = ~flags[begin : begin + part.half]
    values = words.view(np.uint16).reshape(exchange.MOST_TOKENS, -1)
    whole = values.reshape(-1)
    many = exchange.MOST_TOKENS * part.rows
    return whole[:many].reshape(-1, part.rows), whole[many:].reshape(-1, part.columns)


def test_the_arrays_do_not_overlap():
    part = Exchange(24, 40, 12)
    assert part.halves - part.word >= 32 and part.heads - part.halves == 8 * 24 // 2
    assert part.end == part.halves + 2 * part.half == part.word + exchange.flag_words(24, 40)
    assert part.half == 8 * (24 + 40) // 2 and part.misfit() is None
    assert "multiples of 8" in Exchange(20, 40).misfit()


@pytest.mark.parametrize("t", [1, 5, 8])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(
    "plan", [Plan(88, 256, 2, 1, 4, 1, 2, ctas=5), Plan(80, 512, 2, 1, 8, ctas=6)]
)
def test_rows_are_left_in_words(plan, turn, t, rng):
    """By blocks of even rows, the last of which has some of the one before."""
    part, hooks, rows = Exchange(plan.rows, 16), lanes.ExchangingLanes(plan, t), plan.rows
    assert plan.block_rows % 2 == 0 and plan.groups * plan.block_rows > rows
    flags = np.zeros(part.end, U32)
    sums = rng.normal(size=(plan.groups, plan.steps, plan.sums_floats)).astype(F32)
    wanted = np.zeros((t, rows))
    with emulated(*MODULES):
        for block in range(plan.groups):
            first = min(block * plan.block_rows, rows - plan.block_rows)
            for step in range(plan.steps):
                out = Memory(np.full((t, rows), np.nan, BF16))
                own = Memory(sums[block, step].reshape(plan.warps // 4, -1))
                linear_lanes.Lanes.finish(hooks, own, out, first, step, 0)
                there = ~np.isnan(out.array.astype(F32))
                wanted[there] = out.array[there]
                hooks.finish(own, left(flags, turn, part, False), first, step, 0)
    found = half_of(flags, part, turn)
    np.testing.assert_array_equal(found[0][:t].view(BF16).astype(np.float64), wanted)
    assert (found[0][t:] == 0xFFFF).all() and (found[1] == 0xFFFF).all()
    assert all((other == 0xFFFF).all() for other in half_of(flags, part, 1 - turn))


@pytest.mark.parametrize("t", [1, 6, 8])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(
    "plan", [Plan(96, 1024, 1, 1, 8, 1), Plan(96, 1024, 2, 1, 8, 2), Plan(96, 768, 2, 1, 4, 3)]
)
def test_x_is_taken_from_words(plan, turn, t, rng):
    """The same words as of an array, for both widths of weights, in whatever parts."""
    x = rng.normal(size=(t, plan.columns)).astype(BF16)
    part, hooks = Exchange(40, plan.columns, 8), lanes.ExchangingLanes(plan, t)
    flags = rng.integers(1, 2**32, part.end, dtype=U32)
    begin = part.heads + turn * part.half
    flags[begin : begin + x.size // 2] = ~x.reshape(-1).view(U32)
    with emulated(*MODULES):
        for group in range(plan.warps // 4):
            wanted = linear_lanes.Lanes.fetch(hooks, Memory(x), 0, group)
            found = hooks.fetch(left(flags, turn, part, True), 0, group)
            for one, other in zip(found, wanted, strict=True):
                np.testing.assert_array_equal(one, other)
        flags[begin + int(rng.integers(x.size // 2))] = 0
        with pytest.raises(AssertionError, match="wait for ever"):
            for group in range(plan.warps // 4):
                hooks.fetch(left(flags, turn, part, True), 0, group)


def test_the_other_half_is_cleared_and_then_used(rng):
    """Blocks agree on a half, clear the other one whole, and leave the word for the next launch."""
    part, turn = Exchange(24, 56, 4), Memory(np.zeros(1, np.int32))
    together = lanes.Together(BLOCKS, part)
    flags = Memory(np.zeros(part.end + 9, U32))
    for launch in range(3):
        begin = part.halves + launch % 2 * part.half
        flags.array[part.halves : part.end] = rng.integers(1, 2**32, 2 * part.half, dtype=U32)
        flags.array[part.end :] = rng.integers(1, 2**32, 9, dtype=U32)
        before = flags.array.copy()
        for block in rng.permutation(BLOCKS):
            turn.array[0] = 7
            with emulated(*MODULES):
                together.begin(dict(flags=flags, turn=turn), int(block))
            assert turn.array[0] == launch % 2
        other = part.halves + (1 - launch % 2) * part.half
        before[other : other + part.half] = 0
        before[part.word] = (launch + 1) % 2 << 31
        np.testing.assert_array_equal(flags.array, before)
        assert before[begin : begin + part.half].all()


def test_no_rounded_number_says_that_it_is_not_there():
    """NaNs of all kinds, infinities, the greatest: none is 0xFFFF."""
    bits = np.concatenate([np.arange(0x7F800000, 0x7F800100), np.arange(0x7FFFFF00, 0x80000000)])
    words = np.concatenate([bits, bits | 1 << 31]).astype(U32).view(F32)
    with np.errstate(invalid="ignore"):
        assert (words.astype(BF16).view(np.uint16) != 0xFFFF).all()
