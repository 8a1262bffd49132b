"""The whole few-token linear by its PTX hooks, on the emulator."""

import numpy as np
from lane_emulator import F32, Memory, emulated

from pallas_kernels import ahead
from pallas_kernels.linear import arithmetic, lanes, memory

MODULES = lanes, arithmetic, memory, ahead


def run(plan, x, weight, scale, norm, epsilon, out_dtype, t, residual=None):
    """The whole linear, as the blocks of the grid do it, without ring and barriers."""
    unit = 0 if scale is None else plan.rows // scale.shape[0]
    hooks = lanes.Lanes(plan, t, unit, epsilon)
    out = Memory(np.full((plan.split, t, plan.rows), np.nan, out_dtype))
    x_ref = Memory(x)
    scale_ref = None if scale is None else Memory(scale)
    weight_ref, told = Memory(weight), (Memory(np.zeros(99, np.uint32)), 3)
    groups = plan.warps // 4
    with emulated(*MODULES):
        for cta in range(plan.groups * plan.split):
            piece = cta % plan.split
            first = min(cta // plan.split * plan.block_rows, plan.rows - plan.block_rows)
            fetched = [hooks.fetch(x_ref, piece, group) for group in range(groups)]
            if norm is not None:
                norms = Memory(np.full((plan.warps, 16), np.nan, F32))
                for group in range(groups):
                    hooks.squares(fetched[group], norms, group)
                fetched = [
                    hooks.normed(fetched[group], norms, Memory(norm), piece, group)
                    for group in range(groups)
                ]
            operands = list(map(hooks.operands, fetched))
            for step in range(plan.steps):
                sums_ref = np.full((groups, plan.sums_floats // groups), np.nan, F32)
                memories = [Memory(row) for row in sums_ref]
                for group in range(groups):
                    scales, sums = None, None
                    if scale is not None:
                        scales = hooks.scales(scale_ref, first, step, piece, group)
                    for part in range(plan.parts):
                        stage = Memory(np.full(plan.stage_bytes, 0xFF, np.uint8))
                        rows = plan.last_rows if step == plan.steps - 1 else plan.step_rows
                        row = first + step * plan.step_rows
                        hooks.copy(weight_ref, row, rows, piece, part, stage, told, 1)
                        sums = hooks.multiply(sums, operands[group], scales, part, stage, group)
                    hooks.put(sums, memories[group])
                whole = Memory(np.stack([memory.array for memory in memories]))
                added = None
                if residual is not None:
                    added = hooks.residual(Memory(residual), first, step)
                hooks.finish(whole, out, first, step, piece, added)
    return out.array.astype(np.float64).sum(0)
