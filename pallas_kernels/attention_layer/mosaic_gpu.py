"""A window layer's attention on Hopper, in one launch: how its matrices are cut for one ring."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax

from pallas_kernels.attention.ring_block import shape_of
from pallas_kernels.attention_layer.block import Layer, exchange_of, misfit, stages_of
from pallas_kernels.attention_layer.narrow import NarrowRing
from pallas_kernels.linear.block import Block
from pallas_kernels.linear.plan import Plan

_WARPS = (16, 12, 8, 4)
_PARTS = (1, 2, 3, 4, 6, 8)
_LEAST_BYTES = 8 << 10
_MOST_BYTES = {2: 32 << 10, 1: 24 << 10}
"""Of a stage, by the tiles of a step."""


@functools.cache
def plans_for(rows: int, columns: int, itemsize: int, d: int, inner: int, output_itemsize: int):
    """Plans of [rows, columns] and [d, inner] whose stages are of the same bytes, or two Nones.

    Of as many warps, and with two tiles a step, unless that were a single step of the first: a warp
    waits half as often for a stage, and for what it loads.
    """
    for warps in _WARPS:
        for tiles, most in _MOST_BYTES.items():
            firsts = [_try(rows, columns, itemsize, warps, parts, tiles) for parts in _PARTS]
            seconds = [_try(d, inner, output_itemsize, warps, parts, tiles) for parts in _PARTS]
            for first, second in itertools.product(filter(None, firsts), [*filter(None, seconds)]):
                alike = first.stage_bytes == second.stage_bytes
                if alike and first.steps >= tiles and _LEAST_BYTES <= first.stage_bytes <= most:
                    return first, second
    return None, None


def _try(rows, columns, itemsize, warps, parts, tiles) -> Plan | None:
    """A plan, each of whose blocks has an even number of rows: two are one word to exchange."""
    try:
        plan = Plan(rows, columns, itemsize, 1, warps, parts, tiles)
        if plan.block_rows % 2:
            plan = dataclasses.replace(plan, ctas=-(-rows // (plan.block_rows + 1)))
        return plan
    except ValueError:
        return None


class Cuts(NamedTuple):
    """How a call's work is cut: both matrices, and attention."""

    first: Plan | None
    second: Plan | None
    ring: NarrowRing

    def misfit(self) -> str | None:
        """Why this cannot be one launch."""
        return misfit(*self)


def cuts_of(h, qkv, cos, keys, values, sink, output, window, value_scale) -> Cuts:
    """The cuts of a call."""
    groups, sizes = keys.shape[1], (*qkv.shape, qkv.dtype.itemsize)
    product = jax.ShapeDtypeStruct((*h.shape[:2], groups, qkv.shape[0] // groups), h.dtype)
    shape = shape_of(product, cos, keys, values, window, sink, value_scale)
    ring = NarrowRing(**(dataclasses.asdict(shape) | dict(eights=1)))
    return Cuts(*plans_for(*sizes, *output.shape, output.dtype.itemsize), ring)


_STATIC = (
    "word", "window", "value_scale", "epsilon", "stream", "plans", "stages", "interpret", "hooks",
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=_STATIC)
def attention_layer_mosaic(
    h, norm, qkv, qkv_scale, cos, sin, keys, values, start, live, sink, output, output_scale, flags,
    ahead=None,
    *, word=0, window, value_scale, epsilon, stream=False, plans=None, stages=None, interpret=None,
    hooks=None, seen=None,
):  # fmt: skip
    """See `api.attention_layer`; one launch. Returns what it writes by name, and both caches.

    `plans` of both matrices decide over the result's bits; `stages` are the ring's. To run on a
    CPU, `interpret` are Pallas' interpreter's parameters, `hooks` make those of a matrix and of
    what blocks do together, and `seen` is what the launch before this one wrote, since there
    blocks run one after another; the caches are not written then.
    """
    cuts = cuts_of(h, qkv, cos, keys, values, sink, output, window, value_scale)
    cuts = cuts if plans is None else Cuts(*plans, cuts.ring)
    if (why := cuts.misfit()) is not None:
        raise ValueError(f"attention_layer cannot take {why}.")
    ahead_bytes = 0 if ahead is None else ahead.nbytes
    scales = qkv_scale, output_scale
    layer = make_layer(cuts, scales, epsilon, hooks, stages, word, ahead_bytes, stream)
    held = [x if interpret else jax.new_ref(x) for x in (keys, values)]
    inputs = dict(
        h=h.reshape(-1, h.shape[-1]),
        norm=norm,
        qkv_weight=_cut(cuts.first, qkv),
        output_weight=_cut(cuts.second, output),
        **dict(zip(("keys", "values"), held, strict=True)),
        **dict(cos=cos, sin=sin, start=start, live=live, flags=flags),
    )
    more = dict(qkv_scale=qkv_scale, output_scale=output_scale, sink=sink, ahead=ahead)
    inputs |= {name: x for name, x in more.items() if x is not None}
    found = layer.call(inputs, seen or {}, interpret)
    return found, *(x if interpret else jax.freeze(x) for x in held)


def _cut(plan: Plan, weight):
    return weight.reshape(plan.rows, plan.split, plan.parts, plan.warps, plan.part_columns)


def make_layer(
    cuts: Cuts, scales, epsilon, hooks=None, stages=None, word=0, ahead_bytes=0, stream=False
) -> Layer:
    """The launch; arguments as of `attention_layer_mosaic`."""
    if hooks is None:
        from pallas_kernels.attention_layer.lanes import ExchangingLanes, Together

        hooks = ExchangingLanes, Together
    (first, second, ring), (lanes, together) = cuts, hooks
    t, stages = ring.b * ring.t, stages or stages_of(*cuts)
    units = [
        0 if scale is None else plan.rows // scale.shape[0]
        for plan, scale in zip((first, second), scales, strict=True)
    ]
    projection = Block(first, lanes(first, t, units[0], epsilon), ring=stages)
    before = first.copies, first.steps
    output = Block(second, lanes(second, t, units[1]), ahead_bytes, before=before, ring=stages)
    blocks = max(first.groups, second.groups, ring.b * ring.k * ring.tiles)
    together = together(blocks, exchange_of(first, second, word))
    return Layer(projection, ring, output, together, blocks, stream)
