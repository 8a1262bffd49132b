"""A block's own list, its operations carried out in numpy, against the list that XLA makes."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if jax.__version_info__ < (0, 11, 2):
    pytest.skip("the Mosaic GPU kernels need jax >= 0.11.2", allow_module_level=True)

from pallas_kernels import ptx  # noqa: E402
from pallas_kernels.expert_ffn import grid, slots  # noqa: E402

THREADS = 128


def unsigned(value):
    return np.asarray(value, np.int64) & 0xFFFFFFFF


class Arith:
    """The operations of the arith dialect that the list uses, on arrays of 128 threads."""

    CmpIPredicate = grid.arith.CmpIPredicate
    addi = addf = staticmethod(np.add)
    subi = staticmethod(np.subtract)
    muli = staticmethod(np.multiply)
    andi = staticmethod(np.bitwise_and)
    ori = staticmethod(np.bitwise_or)
    xori = staticmethod(np.bitwise_xor)
    maxsi = staticmethod(np.maximum)
    minsi = staticmethod(np.minimum)
    select = staticmethod(np.where)

    @staticmethod
    def minui(a, b):
        return np.where(unsigned(a) < unsigned(b), a, b)

    @staticmethod
    def extui(kind, condition):
        return condition.astype(kind)

    @staticmethod
    def divui(a, b):
        return (unsigned(a) // unsigned(b)).astype(np.int32)

    @staticmethod
    def remui(a, b):
        return (unsigned(a) % unsigned(b)).astype(np.int32)

    @staticmethod
    def shrui(a, b):
        return (unsigned(a) >> unsigned(b)).astype(np.int32)

    @staticmethod
    def shli(a, b):
        return (unsigned(a) << unsigned(b)).astype(np.uint32).view(np.int32)

    @staticmethod
    def cmpi(predicate, a, b):
        signed, plain = (a, b), (unsigned(a), unsigned(b))
        return {
            Arith.CmpIPredicate.ult: lambda: plain[0] < plain[1],
            grid._SLT: lambda: signed[0] < signed[1],
            grid._EQ: lambda: np.equal(*signed),
            Arith.CmpIPredicate.ne: lambda: np.not_equal(*signed),
        }[predicate]()


def fake_asm(_, operands, text, *rest, **options):
    if text == grid._MARK_IF:
        flag, (ref, index), bit = (operands[0], operands[1], operands[2])
        for thread in np.flatnonzero(flag):
            ref[index[thread]] |= bit[thread]
        return None
    if "popc" in text:
        return np.bitwise_count(operands[0].view(np.uint32)).astype(np.int32)
    assert "shl.b32" in text
    # A shift by 32 gives 0.
    return ((np.int64(1) << unsigned(operands[0])) - 1).astype(np.uint32).view(np.int32)


def fill(value, kind=np.int32):
    return np.full(THREADS, value, kind)


UTILS = types.SimpleNamespace(
    c=lambda value, kind: fill(value, kind),
    thread_idx=lambda: np.arange(THREADS, dtype=np.int32),
    warpgroup_barrier=lambda: None,
)


def store_if(condition, ref, index, value):
    for thread in np.flatnonzero(condition):
        ref.reshape(-1)[index[thread]] = value[thread]


@pytest.fixture
def machine(monkeypatch):
    """`grid`, and `ptx` of which it is made, with MLIR's operations carried out in numpy."""
    for module in (grid, ptx):
        monkeypatch.setattr(module, "arith", Arith)
        monkeypatch.setattr(module, "utils", UTILS)
    for module, fakes in {
        grid: {
            "_true": lambda: fill(True, bool),
            "_false": lambda: fill(False, bool),
            "_store_if": store_if,
        },
        ptx: {
            "i32": lambda: np.int32,
            "f32": lambda: np.float32,
            "address": lambda ref, index, size: (ref.reshape(-1), np.add(fill(0), index)),
            "load": lambda ref, index, kind: ref.reshape(-1)[index],
            "load_values": lambda at, num_bytes, n, kind: [
                at[0][at[1] + num_bytes // 4 + k] for k in range(n)
            ],
            "asm": fake_asm,
        },
    }.items():
        for name, fake in fakes.items():
            monkeypatch.setattr(module, name, fake)
    return grid


def lists_for(t, most, words):
    """Shared memory before: anything at all."""
    junk = np.int32(123456789)
    lists = dict(count=(1,), expert=(most,), choice=(most, 8), live=(t,), bits=(words,))
    if t > 8:
        lists["token"] = (most, 8)
    found = {name: np.full(shape, junk) for name, shape in lists.items()}
    return {**found, "share": np.full((most, 8), np.nan, np.float32)}


@pytest.mark.parametrize(
    ("t", "c", "experts", "pool"),
    [
        (3, 5, 11, 11),
        (8, 8, 384, 20),
        (16, 8, 300, 12),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, 8, 384, 384), (8, 8, 384, 384), (16, 8, 384, 384), (13, 3, 70, 4))
        ),
    ],
)
def test_a_thread_block_lists_what_xla_lists(t, c, experts, pool, machine, rng):
    ids = rng.integers(-1, pool + 1, (t, c)).astype(np.int32) % (experts + 2) - 1
    routing = rng.random((t, c)).astype(np.float32)
    hooks = machine.Grid(t, c, experts, 132)
    most = slots.most_slots(t, c, experts)
    lists = lists_for(t, most, hooks.words * (1 + (t > 8)))
    hooks._make_list(ids, routing, lists)
    expected = jax.jit(slots.make_slots, static_argnums=2)(
        jnp.asarray(ids), jnp.asarray(routing), experts
    )
    count = int(expected.count[-1])
    assert lists["count"][0] == count and 0 < count <= most
    np.testing.assert_array_equal(lists["live"], expected.live)
    np.testing.assert_array_equal(lists["expert"][:count], expected.expert[:count])
    np.testing.assert_array_equal(lists["choice"], expected.choice)
    chosen = np.asarray(expected.choice) >= 0
    np.testing.assert_array_equal(lists["share"][chosen], np.asarray(expected.share)[chosen])
    if t > 8:
        np.testing.assert_array_equal(lists["token"], expected.token)


def test_no_choice_gives_no_slot(machine):
    hooks = machine.Grid(2, 3, 40, 132)
    lists = lists_for(2, slots.most_slots(2, 3, 40), hooks.words)
    hooks._make_list(np.full((2, 3), 40, np.int32), np.ones((2, 3), np.float32), lists)
    assert lists["count"][0] == 0 and not lists["live"].any()
    assert (lists["choice"] == -1).all()


@pytest.mark.parametrize("ctas", [1, 2, 131, 132])
def test_blocks_that_meet_flip_one_bit_each_time(ctas):
    """The word is fit for the next meeting, and no block but the last to come flips the bit."""
    steps = [grid.first_step(ctas), *[1] * (ctas - 1)]
    assert all(-(2**31) <= step < 2**31 for step in steps)
    word = 0
    for meeting in range(3):
        for order, step in enumerate(np.random.default_rng().permutation(steps)):
            before, word = word, (word + int(step)) % 2**32
            assert ((before ^ word) >> 31 == 1) == (order == ctas - 1)
        assert word == (0, 2**31)[meeting % 2 == 0]
