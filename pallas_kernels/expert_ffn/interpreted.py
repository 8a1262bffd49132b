"""The expert kernel's hooks in plain jnp, for Pallas' interpreter on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.expert_ffn.layout import Plan, unpack_stages
from pallas_kernels.expert_ffn.slots import make_slots
from pallas_kernels.mxfp4 import decode


@dataclasses.dataclass(frozen=True)
class Interpreted:
    """The hooks of `lanes.Lanes` over whole warpgroups: arrays [4 warps, ...], not registers."""

    plan: Plan
    swiglu: bool
    blocked: bool = False

    def fetch(self, x_ref, row_ref, slot, group):
        """[4, 8, slice] float32; a row of -1 is zeros."""
        rows, there = [], x_ref.shape[0]
        for i in range(8):
            row = (i if i < there else -1) if row_ref is None else row_ref[slot, i]
            values = x_ref[jnp.maximum(row, 0), :].astype(jnp.float32)
            rows.append(jnp.where(row >= 0, values, jnp.zeros_like(values)))
        x = jnp.stack(rows)
        width = self.plan.slice_columns
        pieces = [lax.rem(4 * group + warp, self.plan.column_warps) for warp in range(4)]
        return jnp.stack([lax.dynamic_slice_in_dim(x, piece * width, width, 1) for piece in pieces])

    def held(self, rows_ref, group):
        """Hidden rows from shared memory, [4, 8, slice] float32."""
        rows = rows_ref[...].reshape(-1, 8, 32).transpose(1, 0, 2).reshape(8, -1)
        width = self.plan.slice_columns
        pieces = [lax.rem(4 * group + warp, self.plan.column_warps) for warp in range(4)]
        rows = rows.astype(jnp.float32)
        return jnp.stack(
            [lax.dynamic_slice_in_dim(rows, piece * width, width, 1) for piece in pieces]
        )

    def operands(self, fetched):
        """The same."""
        return fetched

    def load(self, stage_ref, group):
        """[4, 16, columns] float32."""
        codes, scales = unpack_stages(stage_ref[...].reshape(1, -1), self.plan)
        return lax.dynamic_slice_in_dim(decode(codes, scales)[0], 4 * group, 4)

    def give_back(self, loaded, place, index):
        """This warpgroup's arrival."""
        self.arrive(place, index)

    def multiply(self, sums, x, part, loaded, ahead=None):
        """Adds one stage's product to sums [4, 16, 8]."""
        width = self.plan.part_columns
        product = jnp.einsum("prk,pnk->prn", loaded, x[:, :, part * width : (part + 1) * width])
        return product if sums is None else sums + product

    @staticmethod
    def told_types(groups) -> dict:
        """Pallas' own barriers."""
        return {
            name: plgpu.Barrier(num_barriers=number, num_arrivals=arrivals)
            for name, number, arrivals in groups
        }

    @staticmethod
    def make_told(refs, groups) -> dict:
        """Each name's barriers."""
        return {name: refs[name] for name, _, _ in groups}

    def arrive(self, barriers, index):
        """This warpgroup's arrival."""
        plgpu.barrier_arrive(barriers.at[index])

    def wait(self, barriers, index, nth):
        """Pallas' barriers count for themselves."""
        plgpu.barrier_wait(barriers.at[index])

    def put(self, sums, ref):
        """Lane 4 g + c holds rows g, g + 8 of tokens 2 c, 2 c + 1."""
        ref[...] = sums.reshape(4, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(512)

    def finish(self, sums_ref, row_ref, share_ref, out_ref, slot, unit):
        """Adds the slices in order and writes the rows of the tokens that chose the expert."""
        p = self.plan
        lanes = sums_ref[...].reshape(p.row_warps, p.column_warps, 8, 4, 2, 2)
        total = lanes[:, 0]
        for piece in range(1, p.column_warps):
            total = total + lanes[:, piece]
        total = total.transpose(2, 4, 0, 3, 1).reshape(8, p.row_warps, 2, 8)  # token, tile, half, g
        if self.swiglu:
            values = jax.nn.silu(total[:, :, 0]) * total[:, :, 1]
            values = values.reshape(8, p.row_warps * 8)
        else:
            values = total.reshape(8, p.row_warps * 16)
        width = values.shape[1]
        for token in range(8):
            target = row_ref[slot, token]

            def write(token=token, target=target):
                row = values[token] * share_ref[slot, token] if self.swiglu else values[token]
                row = row.astype(out_ref.dtype)
                if not (self.blocked and self.swiglu):
                    out_ref[target, pl.ds(unit * width, width)] = row
                    return
                # Tiles of 8 columns, four to a block of 32.
                for n in range(width // 8):
                    tile = unit * (width // 8) + n
                    column = token * 32 + lax.rem(tile, 4) * 8
                    out_ref[slot, lax.div(tile, 4), pl.ds(column, 8)] = row[8 * n : 8 * n + 8]

            pl.when(target >= 0)(write)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The hooks of `grid.Grid`; blocks run one after another, so that none can wait for all."""

    t: int
    c: int
    experts: int
    ctas: int

    @property
    def words(self) -> int:
        """Of a bit map that is not needed here."""
        return 4

    def meet(self, barrier_ref, block):
        """Nothing: the kernel is run twice instead."""

    def claim(self, flags_ref, nth):
        """Every `ctas`-th number of the queue."""
        return lax.axis_index("cta") + nth * self.ctas

    def publish(self, ticket, claims_ref, place):
        """The number itself, and for the others."""
        claims_ref[place] = ticket
        return ticket

    def slots_done(self, flags_ref, slot, known, need, count, wait):
        """Nothing to wait for: the kernel is run twice instead. One look finds every other slot."""
        return jnp.where(wait | (lax.rem(slot, 2) == 0), jnp.maximum(known, slot + 1), known)

    def tell_done(self, flags_ref, slot):
        """Nobody waits."""

    def clear(self, flags_ref):
        """Nothing was counted."""

    def make_list(self, ids_ref, routing_ref, lists):
        """The work list, by `make_slots`."""
        slots = make_slots(ids_ref[...], routing_ref[...], self.experts)
        for name in lists:
            if name == "count":
                lists[name][...] = slots.count[-1:]
            elif name != "bits":
                lists[name][...] = getattr(slots, name)

    def prefetch(self, ahead_ref, block):
        """Nothing: the interpreter has no caches."""

    def add(self, results_ref, live_ref, residual_ref, out_ref, block):
        """All of it, in each block: the last one has seen all results."""
        results = results_ref[...].reshape(self.t, self.c, -1)
        total = jnp.zeros_like(results[:, 0])
        for i in range(self.c):
            total = jnp.where(i < live_ref[...][:, None], total + results[:, i], total)
        if residual_ref is not None:
            total = residual_ref[...].astype(jnp.float32) + total
        out_ref[...] = total.astype(out_ref.dtype)
