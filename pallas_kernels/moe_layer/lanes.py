"""What a launch does before its experts, in PTX. `interpreted.py` has the same in jnp."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import carriers, ptx
from pallas_kernels.attention.machine import Reg
from pallas_kernels.linear import memory
from pallas_kernels.moe_layer.front import Front
from pallas_kernels.moe_layer.machine import FrontMachine

_FLIP = (
    "{ .reg .pred p; .reg .b32 w; setp.eq.s32 p, $0, 0; @p ld.relaxed.gpu.global.b32 w, [$1]; "
    "xor.b32 w, w, 1; @p st.relaxed.gpu.global.b32 [$1], w; }"
)


@dataclasses.dataclass(frozen=True)
class FrontLanes:
    """The hooks of a launch whose experts are chosen in it."""

    front: Front

    def told(self, groups: int) -> tuple[tuple[str, int, int], ...]:
        """Barriers: name, number, warpgroups that arrive; none where copies do."""
        return ("router_full", 2, 0), ("chosen", 1, groups)

    def scratch_types(self) -> dict:
        """Shared memory."""
        shared = self.front.shared
        return {name: plgpu.SMEM((size,), jnp.float32) for name, size in shared.items()}

    def copy(self, refs):
        """Starts to copy the norm's weight and the router's rows of the block's experts."""
        front, place = self.front, refs["router_full"]
        kinds = (*[plgpu.RefType()] * 5, plgpu.Layout.WG_SPLAT)

        @plgpu.inline_mgpu(arg_types=kinds)
        def run(_, router, norm, router_here, gain_here, told, block):
            first = front.held(FrontMachine(ptx.THREADS), Reg(ptx.scalar(block)))
            line = 4 * front.row_words
            copies = (
                (router_here, ptx.address(router, first.value, line), front.own * line),
                (gain_here, ptx.address(norm, 0, 2), 2 * front.columns),
            )
            for nth, (target, source, size) in enumerate(copies, place[1]):
                target, full = ptx.address(target, 0, 4), ptx.address(told, nth, 8)
                memory.copy(ptx.thread(), full, 1, target, source, size)

        here = refs["router_here"], refs["gain_here"]
        run(refs["router"], refs["norm"], *here, place[0], lax.axis_index("cta"))

    def rows(self, hooks, refs, group, stamp):
        """The rows as the experts' products take them, when the work is listed."""
        del group
        block, count = lax.axis_index("cta"), 4 * self.front.pieces
        words = self._run(refs, "scaled_rows", ("flags", "h", "squares", "mark"), count)
        stamp(3)
        for nth in (0, 1):
            hooks.wait(refs["router_full"], nth, 0)
        taken = ("flags", "router_here", "gain_here", "logits", "mark")
        words = self._run(refs, "score", taken, count, block, words)
        stamp(4)
        taken = ("flags", "bias", "alive", "mark", "scores_here", "ids_here", "weights_here")
        self._run(refs, "choose", taken, None)
        hooks.arrive(refs["chosen"], 0)
        stamp(5)
        plgpu.barrier_wait(refs["listed"])
        return words

    def _run(self, refs, name, taken, count, *given):
        """A function of `Front`, by the threads that multiply.

        Args:
          refs: memory.
          name: of the function.
          taken: names of what it takes of the memory, if it is there.
          count: words that it returns, or None.
          *given: the block and words, if it takes them.
        """
        front, taken = self.front, [key for key in taken if key in refs]
        more = (plgpu.Layout.WG_SPLAT, carriers.carrier(4 * front.pieces)) if given else ()
        kind = None if count is None else carriers.carried(count, jnp.int32)

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(taken), *more), return_type=kind)
        def run(_, *arguments):
            memory = dict(zip(taken, arguments, strict=False))
            machine, rest = FrontMachine(32 * front.warps), arguments[len(taken) :]
            if rest:
                rest = Reg(ptx.scalar(rest[0])), [Reg(w) for w in carriers.values(rest[1])]
            found = getattr(front, name)(machine, memory, *rest)
            if count is not None:
                return carriers.carry_values([word.value for word in found], signed=True)

        return run(*(refs[key] for key in taken), *given)

    def chosen(self, hooks, refs):
        """Ids and weights, when all are there."""
        hooks.wait(refs["chosen"], 0, 0)
        return refs["ids_here"], refs["weights_here"]

    def end(self, refs):
        """The next launch is another one: by one block, when all have met."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def run(_, flags):
            at = ptx.address(flags, self.front.words[0], 4)
            ptx.asm(None, [ptx.thread(), at], _FLIP, "r,l", effects=True)

        run(refs["flags"])
