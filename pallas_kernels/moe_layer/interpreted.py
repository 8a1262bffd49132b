"""What a launch does before its experts in plain jnp, for Pallas' interpreter on a CPU."""

import dataclasses

from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.moe_layer.front import Front
from pallas_kernels.router.reference import route_reference


@dataclasses.dataclass(frozen=True)
class FrontInterpreted:
    """The hooks of `lanes.FrontLanes`; each block does all by itself, none waits for others."""

    front: Front

    def told(self, groups: int) -> tuple:
        """No barriers."""
        return ()

    def scratch_types(self) -> dict:
        """No shared memory."""
        return {}

    def copy(self, refs):
        """Nothing to copy."""

    def rows(self, hooks, refs, group, stamp):
        """This warpgroup's slices of the normed rows, when the work is listed."""
        plgpu.barrier_wait(refs["listed"])
        x, _, _ = self._routed(refs)
        return hooks.operands(hooks.fetch(x, None, 0, group))

    def _routed(self, refs):
        """Rows, ids and weights."""
        front = self.front
        names = "h", "norm", "router", "bias"
        live = refs["alive"][...] != 0 if "alive" in refs else None
        return route_reference(
            *(refs[name][...] for name in names),
            live,
            choices=front.c,
            epsilon=front.epsilon,
            normalise=front.normalise,
            scale=front.scale,
        )

    def chosen(self, hooks, refs):
        """Ids and weights."""
        _, ids, weights = self._routed(refs)
        return ids, weights

    def end(self, refs):
        """Nothing was counted."""
