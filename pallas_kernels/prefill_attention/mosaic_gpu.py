"""Prefill attention for Hopper: a thread block for 128 query rows, scores in registers alone.

Query rows of a key/value head are stacked token by token, all heads of a token together: a block
of 128 rows is few tokens (8 of 16 heads), so that it reads hardly more keys than a token sees, and
each tile once for all its heads. One warpgroup copies tiles of keys and values to a ring in shared
memory; two multiply, 64 rows each, and take turns: one uses the tensor cores while the other
softens its scores (as in FlashAttention-3, arXiv 2407.08608). Or three multiply, without turns.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.roles import run_roles
from pallas_kernels.softmax import LOG2E, MASKED

LEAST = -1e25
"""Greatest score of nothing: far above a masked score, whose weight is therefore exactly 0."""
ROWS = 64
"""Query rows of a warpgroup."""
_SHARED_BYTES = 224 * 1024
_MOST_STAGES = 6
_REGISTERS = {1: (40, 232), 2: (40, 232), 3: (32, 160)}
"""Of a thread that copies and one that multiplies, by the number of warpgroups that do."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the kernel is run.

    Attributes:
      tile: keys of a stage; None: 128, or 64 for short windows. It changes bits, nothing else does.
      stages: tiles in shared memory; None: what fits, at most 6.
      turns: two warpgroups take turns at the tensor cores.
      warpgroups: that multiply, up to 3: more share a tile, each with fewer registers.
    """

    tile: int | None = None
    stages: int | None = None
    turns: bool = True
    warpgroups: int = 2

    def __post_init__(self):
        if self.warpgroups not in _REGISTERS or (self.turns and self.warpgroups != 2):
            raise ValueError(f"{self.warpgroups} warpgroups, turns={self.turns}: two take turns.")


@dataclasses.dataclass(frozen=True)
class Prefill:
    """Shapes of a call and a thread block's work."""

    b: int
    t: int
    n: int
    h: int
    v: int
    k: int
    s: int
    window: int | None
    launch: Launch = Launch()
    interpreted: bool = False

    @property
    def group(self) -> int:
        """Query heads of a key/value head."""
        return self.n // self.k

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.launch.warpgroups

    @property
    def block(self) -> int:
        """Query rows of a thread block."""
        return ROWS * self.consumers

    @property
    def row_blocks(self) -> int:
        """Thread blocks of a sequence's key/value head."""
        return -(-self.t * self.group // self.block)

    @property
    def rows(self) -> int:
        """Query rows of a key/value head, padded."""
        return self.row_blocks * self.block

    @property
    def tile(self) -> int:
        """Keys of a stage."""
        short = self.window is not None and self.window < 512
        return self.launch.tile or (64 if short else 128)

    @property
    def stages(self) -> int:
        """Tiles in shared memory."""
        fit = (_SHARED_BYTES - self.block * self.h * 2) // (self.tile * (self.h + self.v) * 2)
        return self.launch.stages or min(_MOST_STAGES, fit)

    def misfit(self) -> str | None:
        """Why the kernel cannot take these shapes."""
        if self.h % 16 or self.v % 16 or self.v > 128 or self.h > 256:
            return (
                f"heads of {self.h} and {self.v}; they must be multiples of 16, at most 256 and 128"
            )
        if self.stages < max(2, self.consumers):
            return f"heads of {self.h} and {self.v} in tiles of {self.tile}: too few fit"
        if self.s % 8:
            return f"keys of {self.s} rows; the copy engine takes multiples of 8"
        return None

    # --- a thread block ---------------------------------------------------------------------------

    def find(self, refs) -> "Work":
        """This block's rows and the tiles that they see; the longest blocks begin first."""
        sequence, kv = lax.axis_index("sequence"), lax.axis_index("kv")
        block = self.row_blocks - 1 - lax.axis_index("block")
        start, live, first = (refs[name][sequence] for name in ("start", "live", "first"))
        row = block * self.block
        one, last = lax.div(row, self.group), lax.div(row + (self.block - 1), self.group)
        last = jnp.minimum(last, live - 1)
        # From here on in rows of keys: query token i lies at row `base` + i.
        base, low, begin = start - first, jnp.int32(0), jnp.int32(0)
        if self.window is not None:
            before = jnp.maximum(-first, 0)
            low = jnp.maximum(base - self.window + 1, before)
            begin = lax.div(jnp.maximum(base + one - self.window + 1, before), self.tile)
        end = jnp.where(one <= last, lax.div(base + last, self.tile) + 1, begin)
        plain = jnp.minimum(lax.div(base + one + 1, self.tile), end)
        return Work(sequence, kv, row, base, low, base + live, begin, plain, end)

    def produce(self, refs):
        """Copies tile after tile, each as soon as its place in the ring is free."""
        work = self.find(refs)
        pairs = (
            ("keys", "keys_full", "keys_empty"),
            ("values", "values_full", "values_empty"),
        )

        def step(i, _):
            stage = lax.rem(i, self.stages)
            rows = pl.ds((work.begin + i) * self.tile, self.tile)
            for name, full, empty in pairs:
                source = refs[name].at[work.sequence, work.kv, rows]
                target = refs[f"{name}_ring"].at[stage]
                pl.when(i >= self.stages)(
                    lambda empty=empty: plgpu.barrier_wait(refs[empty].at[stage])
                )
                plgpu.copy_gmem_to_smem(source, target, refs[full].at[stage])

        def drain(i, _):
            for *_, empty in pairs:
                plgpu.barrier_wait(refs[empty].at[lax.rem(i, self.stages)])

        count = work.end - work.begin
        lax.fori_loop(0, count, step, None)
        lax.fori_loop(jnp.maximum(0, count - self.stages), count, drain, None)

    def consume(self, refs):
        """One warpgroup's 64 query rows."""
        me, work = lax.axis_index("wg"), self.find(refs)
        row = work.row + me * ROWS
        where = work.sequence, work.kv, pl.ds(row, ROWS)
        plgpu.copy_gmem_to_smem(refs["q"].at[where], refs["q_held"].at[me], refs["q_full"].at[me])
        plgpu.barrier_wait(refs["q_full"].at[me])
        out = self.means(refs, work, row, self.fold(refs, work, row, me))
        # No stage is in use any more; by turns the last one may be, by the second warpgroup, and
        # the first does not take that.
        stage = lax.rem(work.end - work.begin + self.stages - me, self.stages)
        shown = refs["values_ring"].at[stage, pl.ds(0, ROWS)]
        shown[...] = out.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(shown, refs["out"].at[where])
        plgpu.wait_smem_to_gmem(0)

    def fold(self, refs, work, row, me):
        """Sum of weights, greatest score and weighted sum of values over all tiles."""
        reduced = plgpu.Layout.WGMMA.reduce(1)
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), reduced)
        top = plgpu.layout_cast(jnp.full((ROWS,), LEAST, jnp.float32), reduced)
        sums = plgpu.layout_cast(jnp.zeros((ROWS, self.v), jnp.float32), plgpu.Layout.WGMMA)
        carry = total, top, sums
        meet, turns = functools.partial(self.meet, refs), self.launch.turns
        pl.when((me == 1) & turns)(meet)
        step = functools.partial(self.step, refs, work, row, me)
        masked, plain = (functools.partial(step, masked=masked) for masked in (True, False))
        if self.window is None:
            carry = lax.fori_loop(work.begin, work.plain, plain, carry)
            carry = lax.fori_loop(work.plain, work.end, masked, carry)
        else:
            # Hardly a tile of a short window is seen whole.
            carry = lax.fori_loop(work.begin, work.end, masked, carry)
        # By turns the first one thus waits until the other has only its last product to do.
        pl.when((me == 0) | (not turns))(meet)
        return carry

    def meet(self, refs):
        """Waits for the other warpgroups."""
        plgpu.barrier_arrive(refs["turn"])
        plgpu.barrier_wait(refs["turn"])

    def turn(self, refs):
        """Leaves the tensor cores to the other warpgroup, or takes them."""
        if self.launch.turns:
            self.meet(refs)

    def step(self, refs, work, row, me, i, carry, masked: bool):
        """One tile."""
        total, top, sums = carry
        stage = lax.rem(i - work.begin, self.stages)
        plgpu.barrier_wait(refs["keys_full"].at[stage])

        def score(ref):
            plgpu.wgmma(ref, refs["q_held"].at[me], refs["keys_ring"].at[stage].T)
            self.turn(refs)  # While the tensor cores work.
            return ref[...]

        scores = pl.run_scoped(score, plgpu.ACC((ROWS, self.tile), jnp.float32))
        plgpu.barrier_arrive(refs["keys_empty"].at[stage])
        # Masked before anything is rounded: what follows is the same with and without masks.
        if masked:
            scores = jnp.where(self.seen(work, row, i), scores, MASKED)
        scale = jnp.float32(self.h**-0.5 * LOG2E)
        # Whole: see `pallas_kernels.softmax`.
        new = jnp.maximum(top, jnp.round(scores.max(axis=1) * scale))
        shrink = jnp.exp2(top - new)
        weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new, scores.shape, [0]))
        total = total * shrink + weights.sum(axis=1)
        sums = sums * lax.broadcast_in_dim(shrink, sums.shape, [0])
        weights = weights.astype(jnp.bfloat16)
        plgpu.barrier_wait(refs["values_full"].at[stage])
        if masked:
            self.clear(refs, work, i, stage)
        self.turn(refs)
        sums = self.mix(sums, weights, refs["values_ring"].at[stage])
        plgpu.barrier_arrive(refs["values_empty"].at[stage])
        return total, new, sums

    def mix(self, sums, weights, values):
        """sums + weights @ values, added by the tensor cores."""
        if self.interpreted:
            # The interpreter knows no product of registers.
            return sums + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
        accumulate = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))
        return accumulate(plgpu.ACC.init(sums))

    def seen(self, work, row, i):
        """Which keys of a tile each query row sees."""
        kind = functools.partial(
            plgpu.broadcasted_iota, jnp.int32, (ROWS, self.tile), layout=plgpu.Layout.WGMMA
        )
        key = i * self.tile + kind(1)
        query = work.base + lax.div(kind(0) + row, self.group)
        seen = (key <= query) & (key < work.stop)
        if self.window is None:
            return seen
        return seen & (key >= work.low) & (key > query - self.window)

    def clear(self, refs, work, i, stage):
        """Values that no query of the chunk sees become 0: NaN would outlive a weight of 0.

        Both warpgroups do it, each before its own products; both write the same.
        """
        first = i * self.tile

        @pl.when((first + self.tile > work.stop) | (first < work.low))
        def _():
            ring = refs["values_ring"].at[stage]
            values = plgpu.load(ring, layout=plgpu.Layout.WGMMA)
            place = first + plgpu.broadcasted_iota(
                jnp.int32, (self.tile, self.v), 0, layout=plgpu.Layout.WGMMA
            )
            used = (place < work.stop) & (place >= work.low)
            ring[...] = jnp.where(used, values, jnp.zeros_like(values))
            plgpu.commit_smem()

    def means(self, refs, work, row, carry):
        """The weighted means, with the sinks' mass."""
        total, top, sums = carry
        where = work.kv, pl.ds(row, ROWS)
        reduced = plgpu.Layout.WGMMA.reduce(1)
        sink = plgpu.load(refs["sink"].at[where], layout=reduced, optimized=False)
        new = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - new)
        total = jnp.maximum(total * shrink + jnp.exp2(sink - new), 1e-30)
        return sums * lax.broadcast_in_dim(shrink / total, sums.shape, [0])

    def call(self, q, keys, values, start, live, first, sink):
        """Launches.

        Args:
          q: [b, k, rows, h].
          keys: [b, k, s, h].
          values: [b, k, s, v].
          start: [b], as all numbers of sequences.
          live: queries that count.
          first: position of the keys' first row.
          sink: [k, rows] float32, times log2 e.

        Returns:
          [b, k, rows, v].
        """
        inputs = dict(q=q, keys=keys, values=values, start=start, live=live, first=first, sink=sink)
        producer, consumer = _REGISTERS[self.consumers]

        def body(*given, **scratch):
            refs = dict(zip((*inputs, "out"), given, strict=True)) | scratch
            run_roles(self, refs, consumer, producer=producer)

        def held(*dims):
            wide = _swizzle(dims[-1])
            transforms = plgpu.TilingTransform((8, wide // 2)), plgpu.SwizzleTransform(wide)
            return plgpu.SMEM(dims, jnp.bfloat16, transforms=transforms)

        def barriers(arrivals=1):
            return plgpu.Barrier(num_barriers=self.stages, num_arrivals=arrivals)

        return plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((self.b, self.k, self.rows, self.v), jnp.bfloat16),
            grid=(self.row_blocks, self.k, self.b),
            grid_names=("block", "kv", "sequence"),
            num_threads=self.consumers + 1,
            thread_name="wg",
            scratch_types=dict(
                q_held=held(self.consumers, ROWS, self.h),
                keys_ring=held(self.stages, self.tile, self.h),
                values_ring=held(self.stages, self.tile, self.v),
                q_full=plgpu.Barrier(num_barriers=self.consumers),
                keys_full=barriers(),
                values_full=barriers(),
                keys_empty=barriers(self.consumers),
                values_empty=barriers(self.consumers),
                turn=plgpu.Barrier(num_arrivals=self.consumers),
            ),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            kernel_name="prefill_attention",
            interpret=plgpu.InterpretGPUParams() if self.interpreted else None,
        )(*inputs.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Work:
    """A block of query rows, from `row` on, and its tiles, `begin` to `end`, in rows of keys.

    Token i of the chunk lies at row base + i; no query of the chunk sees rows below `low` or from
    `stop` on. Without a window every query row of the block sees all of the tiles up to `plain`.
    """

    sequence: jax.Array
    kv: jax.Array
    row: jax.Array
    base: jax.Array
    low: jax.Array
    stop: jax.Array
    begin: jax.Array
    plain: jax.Array
    end: jax.Array


def _swizzle(columns: int) -> int:
    """Bytes of the units in which rows of so many bfloat16 lie in shared memory."""
    return next(wide for wide in (128, 64, 32) if columns * 2 % wide == 0)


def shape_of(q, keys, values, window, launch: Launch | None = None) -> Prefill:
    """The call's shapes, with the work of a thread block."""
    b, t, n, h = q.shape
    return Prefill(b, t, n, h, values.shape[3], *keys.shape[1:3], window, launch or Launch())


@functools.partial(jax.jit, static_argnames=("window", "launch"))
def prefill_attention_mosaic(q, keys, values, start, live, first, sink, *, window, launch=None):
    """See `api.prefill_attention`; `first` and `sink` may be None."""
    shape = shape_of(q, keys, values, window, launch)
    return run(shape, q, keys, values, start, live, first, sink)


def run(shape: Prefill, q, keys, values, start, live, first, sink):
    """Stacks the heads, launches, and takes the stack apart: for one key/value head, no copies."""
    b, t, k, group = shape.b, shape.t, shape.k, shape.group
    rows = q.reshape(b, t, k, group, shape.h).transpose(0, 2, 1, 3, 4)
    rows = rows.reshape(b, k, t * group, shape.h)
    if shape.rows > t * group:
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, shape.rows - t * group), (0, 0)))
    first = jnp.zeros_like(start) if first is None else first
    sink = jnp.full(shape.n, MASKED) if sink is None else sink
    sink = (sink.astype(jnp.float32) * LOG2E).reshape(k, 1, group)
    sink = jnp.broadcast_to(sink, (k, -(-shape.rows // group), group)).reshape(k, -1)
    out = shape.call(rows, keys, values, start, live, first, sink[:, : shape.rows])
    out = out[:, :, : t * group].reshape(b, k, t, group, shape.v)
    return out.transpose(0, 2, 1, 3, 4).reshape(b, t, shape.n, shape.v)
