"""The expert kernel's own PTX hooks, emulated on a CPU, against float64: fragments, addresses."""

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from expert_cases import distance  # noqa: E402
from lane_emulator import F32, Memory, emulated  # noqa: E402

from pallas_kernels import ptx  # noqa: E402
from pallas_kernels.expert_ffn import lanes, layout  # noqa: E402

BF16 = ml_dtypes.bfloat16
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
SLOTS, SLOT, TARGETS = 3, 1, 11
TOLERANCE = {"gate/up": 4e-3, "down": 1e-6}
"""Hidden values are rounded to bfloat16."""
CASES = {
    "gate/up": layout.Plan(64, 1536, 1, 12, 2),
    "gate/up, two slices": layout.Plan(128, 256, 4, 2, 2),
    "gate/up, twelve tiles": layout.Plan(192, 128, 12, 1, 1),
    "down": layout.Plan(384, 128, 12, 1, 1),
    "down, four slices": layout.Plan(96, 512, 3, 4, 1),
}


def make(rng, plan):
    """Packed stages, and the matrix in float64."""
    codes = rng.integers(0, 256, (plan.rows, plan.columns // 2), dtype=np.uint8)
    scales = rng.integers(108, 121, (plan.rows, plan.columns // 32)).astype(np.uint8)
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)
    values = E2M1[nibbles & 7] * np.where(nibbles < 8, 1, -1)
    values *= 2.0 ** (np.repeat(scales, 32, 1).astype(int) - 127)
    return layout.pack(codes, scales, plan).reshape(-1, plan.stage_words), values


def multiply(plan, hooks, stages, x, group, rng):
    """A warpgroup's sums of a unit's stages; what is loaded ahead changes nothing."""
    sums = None
    for part, stage in enumerate(stages):
        loaded = hooks.load(Memory(stage), group)
        noise = Memory(rng.integers(0, 2**32, plan.stage_words, dtype=np.uint32))
        sums = hooks.multiply(sums, x, part, loaded, hooks.load(noise, group))
    return sums


def run(plan, hooks, stages, operands, refs, out, rng):
    """All units of a slot, as a block does them."""
    for unit in range(plan.units):
        memories = [Memory(np.full(512, np.nan, F32)) for _ in range(plan.warps // 4)]
        for group, memory in enumerate(memories):
            own = stages[unit * plan.parts : (unit + 1) * plan.parts]
            hooks.put(multiply(plan, hooks, own, operands(group), group, rng), memory)
        sums = Memory(np.stack([memory.array for memory in memories]))
        hooks.finish(sums, *refs, out, SLOT, unit)


def targets(rng):
    """Rows of the result for a slot's 8 tokens, some of which did not choose it; their shares."""
    rows = np.full((SLOTS, 8), -1, np.int32)
    rows[SLOT, :5] = rng.permutation(TARGETS)[:5]
    rows[SLOT] = rng.permutation(rows[SLOT])
    return rows, rng.random((SLOTS, 8)).astype(F32)


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("gate")])
def test_the_hooks_compute_hidden_rows(name, blocked, rng):
    """Written row by row, or in blocks of 32 columns as one launch reads them again."""
    plan, t = CASES[name], 5
    stages, weight = make(rng, plan)
    x = rng.normal(size=(t, plan.columns)).astype(BF16)
    rows, shares = targets(rng)
    if blocked:
        rows[SLOT] = np.where(np.arange(8) < t, rows[SLOT].max() - np.arange(8), -1)
    hooks = lanes.Lanes(plan, swiglu=True, blocked=blocked)
    width = plan.rows // 2
    shape = (SLOTS, width // 32, 256) if blocked else (TARGETS, width)
    out = Memory(np.full(shape, np.nan, BF16))
    tokens = Memory(np.where(np.arange(8) < t, np.arange(8), -1).astype(np.int32))

    def operands(group):
        given = (None, 0) if blocked else (tokens, 0)
        return hooks.operands(hooks.fetch(Memory(x), *given, group))

    with emulated(lanes):
        run(plan, hooks, stages, operands, (Memory(rows), Memory(shares)), out, rng)
    wide = (x.astype(np.float64) @ weight.T).reshape(t, -1, 2, 8)
    right = (silu(wide[:, :, 0]) * wide[:, :, 1]).reshape(t, width)
    found = out.array.astype(np.float64) / ptx.RAISE
    chosen = rows[SLOT] >= 0
    assert np.isfinite(found).sum() == chosen.sum() * width
    if blocked:
        found = found[SLOT].reshape(-1, 8, 32).transpose(1, 0, 2).reshape(8, width)[chosen]
    else:
        found = found[rows[SLOT, chosen]]
    right = np.concatenate([right, np.zeros((8 - t, width))]) * shares[SLOT][:, None]
    assert distance(found, right[chosen]) < TOLERANCE["gate/up"]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("down")])
def test_the_hooks_compute_results(name, rng):
    plan = CASES[name]
    stages, weight = make(rng, plan)
    hidden = rng.normal(size=(8, plan.columns)).astype(BF16)
    blocks = (hidden.astype(F32) * F32(ptx.RAISE)).astype(BF16).reshape(8, -1, 32)
    rows, shares = targets(rng)
    hooks = lanes.Lanes(plan, swiglu=False, blocked=True)
    out = Memory(np.full((TARGETS, plan.rows), np.nan, F32))
    held = Memory(blocks.transpose(1, 0, 2).reshape(-1, 256))
    with emulated(lanes):
        refs = Memory(rows), Memory(shares)
        run(plan, hooks, stages, lambda group: hooks.held(held, group), refs, out, rng)
    right = hidden.astype(np.float64) @ weight.T
    chosen = rows[SLOT] >= 0
    assert distance(out.array[rows[SLOT, chosen]], right[chosen]) < TOLERANCE["down"]
    assert np.isfinite(out.array).sum() == chosen.sum() * plan.rows


BUGS = {
    "a rotation": ("{w}, {w}, 10;", "{w}, {w}, 9;"),
    "a factor": ("0x4108", "0x4104"),
    "a mask": ("0x001B001B", "0x001B000B"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_seen(bug, rng, monkeypatch):
    right, wrong = BUGS[bug]
    assert right in lanes._DECODE
    for word in ("$8", "$9"):
        piece = lanes._DECODE.format(w=word)
        spoilt = lanes._DECODE.replace(right, wrong).format(w=word)
        monkeypatch.setattr(lanes, "_BLOCK", lanes._BLOCK.replace(piece, spoilt))
    with pytest.raises(AssertionError):
        test_the_hooks_compute_results("down", rng)
