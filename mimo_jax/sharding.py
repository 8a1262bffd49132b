"""How arrays lie on a mesh: one table from logical to mesh axes, one parameter declaration."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import AnyDrafterConfig
from mimo_jax.errors import MimoError
from pallas_kernels.all_sum import all_gather, all_sum, has_mail, misfit, open_mail

AXIS = "model"
"""The mesh axis over which a model is divided."""

TENSOR_PARALLEL = {
    "vocab": AXIS,  # rows of the embedding and of the head
    "heads": AXIS,  # query heads: sinks, and the columns of the output projection
    "kv_heads": AXIS,  # groups of query heads that share a key/value head, and their cache
    "mlp": AXIS,  # width of a dense MLP
    "feature": AXIS,  # rows of a drafter's projection of the target's features
    "experts": None,
    "expert_mlp": AXIS,  # width of each expert
}
"""Every expert is cut into columns: all devices read as many bytes, whatever the router chose."""

EXPERT_PARALLEL = TENSOR_PARALLEL | {"experts": AXIS, "expert_mlp": None}
"""Whole experts on each device: larger reads, as slow as the device with most chosen experts."""

FP8_TILE = 128
"""Rows and columns of an FP8 weight that share a scale."""

TRAINING = dict.fromkeys(TENSOR_PARALLEL) | {"experts": AXIS}
"""Of training, where the rows of a batch are divided over the same axis: whole experts, with their
masters and what the optimiser keeps of them, on a device each; all else on every device."""

RULES = {"tensor": TENSOR_PARALLEL, "expert": EXPERT_PARALLEL}

AnyMesh = Mesh | AbstractMesh
"""A mesh of devices; or of none that are there, which is enough to learn sizes from."""

Leaf = Any
"""A leaf of a state: an array, its abstract shape or its PartitionSpec. Trees of all three are
made, so that a run-time check for an array would refuse what is right."""


@dataclasses.dataclass(frozen=True)
class Parallel:
    """One device's view of the mesh inside `shard_map`; without an axis it is the only device.

    Attributes:
      axis: of the mesh.
      experts: whether devices hold whole experts.
      ranks: of a program that runs some ranks without the others, to measure them, how many there
        are for each that runs. What the absent ones would send stands in: nothing for sums, the
        present ones' parts for gathers, so that all that follows has its size.
      mail: a reference to this device's mailbox, through which small arrays go (see
        `with_mail`); None leaves all to XLA's collectives.
    """

    axis: str | None = None
    experts: bool = False
    ranks: int = 1
    mail: Any = None

    def with_mail(self) -> "Parallel":
        """The same, with a mailbox: what it exchanges from now on can be in a CUDA graph.

        To be called once by a program, outside of its loops, inside `shard_map`.
        """
        return dataclasses.replace(self, mail=jax.new_ref(open_mail(self.axis)))

    def sum(self, x):
        """Sums an array, or a tree of arrays, over the devices."""
        if self.axis is None:
            return x
        leaves, tree = jax.tree.flatten(x)
        if not all(map(self._by_mail, leaves)) or len({leaf.dtype for leaf in leaves}) > 1:
            return lax.psum(x, self.axis)
        if len(leaves) == 1:
            return tree.unflatten([self._exchange(all_sum, leaves[0])])
        joined = jnp.concatenate([leaf.ravel() for leaf in leaves])
        if not self._by_mail(joined):
            return lax.psum(x, self.axis)
        ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
        sums = jnp.split(self._exchange(all_sum, joined), ends)
        return tree.unflatten([s.reshape(x.shape) for s, x in zip(sums, leaves, strict=True)])

    def add(self, residual, part: Callable):
        """The residual stream plus the devices' parts of a product.

        Args:
          residual: the stream, the same on all devices.
          part: this device's part, by a function of what it is to add itself: the stream on a
            device that has the whole product, else None.
        """
        if self.axis is None or lax.axis_size(self.axis) == 1:
            return self.sum(part(residual))
        y = part(None)
        if self._by_mail(y):
            return self._exchange(functools.partial(all_sum, residual=residual), y)
        return residual + self.sum(y)

    def gather(self, x, dimension: int):
        """Concatenates the devices' parts along a dimension."""
        if self.axis is None:
            return x
        if self._by_mail(x):
            at = dimension % x.ndim
            parts = jnp.moveaxis(self._exchange(all_gather, x), 0, at)
            parts = parts.reshape(*x.shape[:at], -1, *x.shape[at + 1 :])
        else:
            parts = lax.all_gather(x, self.axis, axis=dimension, tiled=True)
        return parts if self.ranks == 1 else jnp.concatenate([parts] * self.ranks, dimension)

    def _by_mail(self, x) -> bool:
        """Whether an array goes through the mailbox."""
        if self.mail is None or not isinstance(x, jax.Array):
            return False
        return misfit(x, self.mail.size, lax.axis_size(self.axis)) is None

    def _exchange(self, exchange, x):
        result, mail = exchange(x, self.mail[...], self.axis)
        self.mail[...] = mail
        return result

    def local(self, ids, size: int):
        """Ids of rows that are divided over the devices, as this one counts its own `size`."""
        # Absent ranks' rows are as this rank's, and so are those of others that are there.
        return ids % size if self.ranks > 1 else ids - self.index * size

    @property
    def index(self):
        """This device's place on the axis, an int32 scalar."""
        return jnp.int32(0) if self.axis is None else lax.axis_index(self.axis).astype(jnp.int32)


def make_mesh(devices: int | Sequence[Any] | None = None) -> Mesh:
    """A mesh over which a model is divided.

    Args:
      devices: how many of jax.devices(), or the devices themselves; all of them by default.

    Raises:
      MimoError: if there are fewer devices than asked for, or it is something else.
    """
    present = jax.devices()
    if devices is None:
        return Mesh(np.array(present), (AXIS,))
    if isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1:
        if devices > len(present):
            raise MimoError(
                f"devices={devices}, but jax.devices() has {len(present)} ({present[0].platform}). "
                f"On a CPU, set XLA_FLAGS=--xla_force_host_platform_device_count={devices} before "
                "jax starts."
            )
        return Mesh(np.array(present[:devices]), (AXIS,))
    several = isinstance(devices, Sequence) and not isinstance(devices, str) and len(devices)
    if not several or not all(isinstance(device, jax.Device) for device in devices):
        raise MimoError(
            f"devices={devices!r} is not allowed: it must be 1 to {len(present)}, or a list of "
            "devices from jax.devices()."
        )
    return Mesh(np.array(devices), (AXIS,))


def has_mail_on(mesh: AnyMesh) -> bool:
    """Whether devices can have mailboxes: several GPUs of one process, counted from the first."""
    if not isinstance(mesh, Mesh) or mesh.devices.flat[0].platform != "gpu":
        return False
    return has_mail([device.id for device in mesh.devices.flat])


def normal(scale: float) -> Callable:
    """An initialiser: normal values of that standard deviation."""
    return lambda key, shape, dtype: (jax.random.normal(key, shape) * scale).astype(dtype)


def constant(value: float | int) -> Callable:
    """An initialiser: one value everywhere."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


class ShapesOnly(nnx.Rngs):
    """Random streams for `nnx.eval_shape`, where nothing is drawn: the same key every time.

    Counting keys under a trace takes time that grows with the square of their number (JAX 0.10
    looks each counter's history up): 8 s for a model of 70 layers, and 0.4 s with these.
    """

    def __init__(self):
        super().__init__(0)

    def params(self) -> jax.Array:
        """The key."""
        return jax.random.key(0)


def param(rngs: nnx.Rngs, shape, axes, dtype, init) -> nnx.Param:
    """Declares a parameter, once for initialiser, sharding, checkpoint and memory plan.

    Args:
      rngs: random streams; one key is drawn from `params`.
      shape: sizes.
      axes: a logical axis of the sharding table, or None, for each dimension.
      dtype: of the values.
      init: `init(key, shape, dtype)`.
    """
    assert len(axes) == len(shape), (axes, shape)
    return nnx.Param(init(rngs.params(), shape, dtype), logical_axes=tuple(axes))


def spec(axes: Sequence[str | None], rules: dict[str, str | None]) -> PartitionSpec:
    """The mesh axes of an array's dimensions.

    Trailing Nones are left out, as jit leaves them out of its results: else a state that comes back
    would be traced anew.
    """
    names = [None if axis is None else rules[axis] for axis in axes]
    while names and names[-1] is None:
        names.pop()
    return PartitionSpec(*names)


def first_part(x, axes: PartitionSpec, parts: int):
    """The first of several equal parts of an array, along each dimension that has a mesh axis."""
    for dimension, axis in enumerate(axes):
        if axis is not None:
            x = lax.slice_in_dim(x, 0, x.shape[dimension] // parts, axis=dimension)
    return x


def param_specs(state: nnx.State, rules: dict[str, str | None]) -> Any:
    """PartitionSpecs of all parameters, as a tree like `state`."""
    return jax.tree.map(
        lambda p: p.replace(spec(p.get_metadata("logical_axes"), rules)),
        state,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def check_divisible(state: nnx.State, mesh: AnyMesh, rules: dict[str, str | None]) -> None:
    """Raises a MimoError naming the first parameter that the mesh cannot divide evenly."""
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata("logical_axes")
        for size, axis in zip(variable.shape, axes, strict=True):
            over = rules[axis] if axis else None
            if over is None:
                continue
            # Scales belong to whole tiles, which must not lie on two devices.
            tile = FP8_TILE if axis == "mlp" and variable.dtype == jnp.float8_e4m3fn else 1
            fits = [n for n in range(1, size + 1) if n == 1 or size % (n * tile) == 0]
            if mesh.shape[over] not in fits:
                whole = f" into whole FP8 tiles of {tile}" if tile > 1 else ""
                raise MimoError(
                    f"{'.'.join(map(str, path))} {variable.shape} has {size} {axis!r}, which "
                    f"{mesh.shape[over]} devices cannot divide{whole}; numbers that can: "
                    f"{[n for n in fits if n <= 64]}."
                )


def check_heads(config: ModelConfig, drafter: AnyDrafterConfig | None, shards: int) -> None:
    """Raises a MimoError if that many devices cannot share the attention heads evenly.

    Query heads are divided. Key/value heads are divided too, or each is given to as many devices as
    there are for one head.
    """
    attentions = {
        f"{'sliding' if kind else 'full'} attention": config.attention(layer)
        for layer, kind in enumerate(config.hybrid_layer_pattern)
    }
    if drafter is not None:
        attentions["the drafter's attention"] = drafter.attention
    for name, attention in attentions.items():
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        fits = [
            n
            for n in range(1, heads + 1)
            if heads % n == 0 and max(n, kv_heads) % min(n, kv_heads) == 0
        ]
        if shards not in fits:
            raise MimoError(
                f"devices={shards} cannot divide {name} with {heads} query and {kv_heads} "
                f"key/value heads; numbers that can: {fits}."
            )


def shardings(specs: Any, mesh: AnyMesh) -> Any:
    """NamedShardings from PartitionSpecs."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
