"""What fits a flow: stages of its ring, units of a claim, places for hidden rows."""

import math

from pallas_kernels.expert_ffn.block import MAX_STAGES, SHARED_BYTES, common_width
from pallas_kernels.expert_ffn.layout import MOST_SLOTS, Plan
from pallas_kernels.expert_ffn.slots import TOKENS, most_slots
from pallas_kernels.shared_memory import shared_bytes

_LEAST_RING, _RING_BYTES = 3, 80 * 1024
"""Stages of the ring at least, and its bytes at most: longer ones were slower.

On an H200, a rank of eight of Pro, 8 tokens: 3, 4, 5 and 6 stages of 26,112 bytes take 45.1, 46.2,
46.8 and 48.0 us of device time (29 November 2026). Likely for the end: what a block has claimed and
not yet multiplied, nobody else can take.
"""


def run_units(down: Plan) -> int:
    """Units of down in one claim: two or more, with three times the bytes of their hidden rows.

    Measured on an H100, 8 tokens: one, two and four of a rank of eight of Pro 71.4, 69.4 and
    70.6 us; two and four of whole experts 406 and 412 us.
    """
    rows = 2 * math.prod(rows_shape(down))
    whole = 4 * down.stage_words * down.parts
    fit = [n for n in range(2, down.units + 1) if down.units % n == 0 and n * whole >= 3 * rows]
    return fit[0] if fit else down.units


def rows_shape(down: Plan) -> tuple[int, int]:
    """A slot's hidden rows: blocks of 32 columns of 8 tokens each."""
    return down.columns // 32, 32 * TOKENS


def x_buffers(down: Plan, stages: int, runs: int) -> int:
    """Places for hidden rows: a claim's are asked for as soon as the ring has a place for it."""
    return max(2, stages // (runs * down.parts) + 1)


def flow_stages(up: Plan, down: Plan, listed: int, runs: int | None = None) -> int:
    """Stages of the ring: no more than help, and what fits beside hidden rows, sums and list.

    A claim's at least, so that its weights need not wait for its hidden rows.
    """
    stage, sums = max(4 * p.stage_words for p in (up, down)), 2 * up.warps * 512
    runs = runs or run_units(down)
    most = min(MAX_STAGES, max(_LEAST_RING, runs * down.parts, _RING_BYTES // stage))
    for stages in range(most, 0, -1):
        rows = x_buffers(down, stages, runs) * 2 * math.prod(rows_shape(down))
        if stages * stage + rows + sums + listed <= SHARED_BYTES:
            return stages
    return 0


def flow_misfit(up: Plan, down: Plan, t: int, c: int, experts: int) -> str | None:
    """Why both passes cannot be one flow, or None."""
    slots = most_slots(t, c, experts)
    if t > TOKENS or t * c > MOST_SLOTS:
        return f"{t} tokens of {c} choices are more than {TOKENS}, or {MOST_SLOTS} choices"
    if up.warps != down.warps:
        return f"the matrices have {up.warps} and {down.warps} warps"
    if common_width(up, down) is None:
        return f"stages of {up.stage_words} and {down.stage_words} words have no common width"
    if flow_stages(up, down, list_bytes(slots)) < 3:
        return "the ring would have less than 3 stages"
    return None


def list_bytes(slots: int) -> int:
    """Shared memory of list, claims and barriers, six arrays of which have a few words."""
    return shared_bytes(*[4 * TOKENS * slots] * 2, 4 * slots, *[4] * 6)
