"""The few-token linear's hooks in plain jnp, for Pallas' interpreter on a CPU."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear.plan import Plan


@dataclasses.dataclass(frozen=True)
class Interpreted:
    """The hooks of `lanes.Lanes` over whole warpgroups: arrays [4 warps, ...], not registers."""

    plan: Plan
    t: int
    unit: int = 0
    epsilon: float = 0.0

    @staticmethod
    def barrier_types(barriers) -> dict:
        """Pallas' own barriers, at which whole warpgroups arrive."""
        return {
            name: plgpu.Barrier(num_barriers=number, num_arrivals=groups or 1)
            for name, number, groups in barriers
        }

    @staticmethod
    def make_barriers(refs, barriers) -> dict:
        """They are made already."""
        return {name: refs[name] for name, _, _ in barriers}

    def arrive(self, place, index):
        """Arrives at one of a row of barriers."""
        plgpu.barrier_arrive(place.at[index])

    def give_back(self, place, index, sums):
        """The same: the interpreter's reads are done when they are begun."""
        plgpu.barrier_arrive(place.at[index])

    def wait(self, place, index, nth):
        """Waits; Pallas counts how often."""
        plgpu.barrier_wait(place.at[index])

    def copy(self, weight_ref, row, rows, piece, part, stage_ref, place, index):
        """By the copy engine."""
        plan, stage = self.plan, stage_ref
        if rows < plan.step_rows:
            stage = stage_ref.at[pl.ds(0, rows)]
        source = weight_ref.at[pl.ds(row, rows), piece, part]
        plgpu.copy_gmem_to_smem(source, stage, place.at[index])

    def copy_norm(self, norm_ref, target_ref, place):
        """By the copy engine."""
        plgpu.copy_gmem_to_smem(norm_ref, target_ref, place.at[0])

    def prefetch(self, ahead_ref, num_bytes, block):
        """Nothing: the interpreter has no caches."""

    def fetch(self, x_ref, piece, group):
        """[4, t, slice] bfloat16."""
        return self._slices(x_ref[...], piece, group)

    def _slices(self, x, piece, group):
        """The warpgroup's slices of rows, parts side by side."""
        width, parts, warps = self.plan.part_columns, self.plan.parts, self.plan.warps

        def slice_of(warp):
            first = (piece * parts * warps + 4 * group + warp) * width
            starts = [first + part * warps * width for part in range(parts)]
            return jnp.concatenate(
                [lax.dynamic_slice_in_dim(x, at, width, 1) for at in starts], axis=1
            )

        return jnp.stack([slice_of(warp) for warp in range(4)])

    def squares(self, fetched, norms_ref, group):
        """Sums of squares, [warps, 16]."""
        total = jnp.square(fetched.astype(jnp.float32)).sum(-1)
        for warp in range(4):
            norms_ref[4 * group + warp, : self.t] = total[warp]

    def normed(self, fetched, norms_ref, norm_ref, piece, group):
        """As `reference.rms_norm`."""
        mean = norms_ref[:, : self.t].sum(0) / self.plan.columns
        scale = lax.rsqrt(mean + self.epsilon)[None, :, None]
        weight = self._slices(norm_ref[...][None], piece, group)
        return (fetched.astype(jnp.float32) * scale).astype(fetched.dtype) * weight

    def operands(self, fetched):
        """In float32."""
        return fetched.astype(jnp.float32)

    def scales(self, scale_ref, first_row, step, piece, group):
        """[4, step rows, segments]."""
        plan = self.plan
        rows = first_row + step * plan.step_rows + jnp.arange(plan.step_rows, dtype=jnp.int32)
        units = jnp.minimum(rows // self.unit, scale_ref.shape[0] - 1)
        tiles = jnp.arange(plan.columns, dtype=jnp.int32)[None] // 128
        columns = self._slices(tiles, piece, group)[:, 0, :: plan.segment]
        return scale_ref[...][units[None, :, None], columns[:, None, :]]

    def multiply(self, sums, x, scales, part, stage_ref, group):
        """Adds one stage's product to sums [4, step rows, t]."""
        plan = self.plan
        weights = lax.dynamic_slice_in_dim(stage_ref[...].astype(jnp.float32), 4 * group, 4, 1)
        x = x[:, :, part * plan.part_columns : (part + 1) * plan.part_columns]
        in_part = plan.segments // plan.parts
        for segment in range(in_part):
            columns = slice(segment * plan.segment, (segment + 1) * plan.segment)
            fresh = jnp.einsum("rpk,ptk->prt", weights[..., columns], x[..., columns])
            if scales is not None:
                fresh = fresh * scales[..., part * in_part + segment][..., None]
            sums = fresh if sums is None else sums + fresh
        return sums

    def put(self, sums, ref):
        """As rows, warps, tokens, in any order that `finish` knows."""
        ref[: sums.size] = sums.reshape(-1)

    def residual(self, residual_ref, first_row, step):
        """[step rows, t] float32; rows past the block's last are of no interest."""
        rows = first_row + step * self.plan.step_rows
        rows = rows + jnp.arange(self.plan.step_rows, dtype=jnp.int32)
        values = residual_ref[...].astype(jnp.float32).T
        return values[jnp.minimum(rows, self.plan.rows - 1)]

    def finish(self, sums_ref, out_ref, first_row, step, piece, residual=None):
        """Adds the slices in order and writes the rows that are the block's."""
        plan = self.plan
        size = 4 * plan.step_rows * self.t
        sums = sums_ref[:, :size].reshape(plan.warps, plan.step_rows, self.t)
        total = sums[0]
        for warp in range(1, plan.warps):
            total = total + sums[warp]
        total = total if residual is None else total + residual

        def write(rows):
            row = first_row + step * plan.step_rows
            for token in range(self.t):
                value = total[:rows, token].astype(out_ref.dtype)
                out_ref[piece, token, pl.ds(row, rows)] = value

        if plan.last_rows == plan.step_rows:
            write(plan.step_rows)
        else:
            pl.when(step < plan.steps - 1)(lambda: write(plan.step_rows))
            pl.when(step == plan.steps - 1)(lambda: write(plan.last_rows))
