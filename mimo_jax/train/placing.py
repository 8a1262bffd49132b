"""Where training's arrays lie: batches and experts divided over the mesh, all else on each device.

Steps are written for whole arrays; the compiler divides them as their inputs are divided. Gradients
are of the whole computation: there is no `shard_map` to take them in.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimo_jax.errors import MimoError
from mimo_jax.sharding import AXIS, TRAINING, check_divisible, param_specs, shardings
from mimo_jax.train.steps import path_name


class Placing:
    """Shardings on one mesh.

    Args:
      mesh: from `make_mesh`.
      batch: rows of a step.
      accumulate: parts that it is taken in.

    Raises:
      MimoError: if the devices cannot share the rows of a part evenly.
    """

    def __init__(self, mesh: Mesh, batch: int, accumulate: int = 1):
        self.mesh, self.devices = mesh, mesh.shape[AXIS]
        if batch % (self.devices * accumulate):
            raise MimoError(
                f"run.batch={batch} rows cannot be divided over {self.devices} devices and "
                f"run.accumulate={accumulate} parts: use a multiple of {self.devices * accumulate}."
            )
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.rows = NamedSharding(mesh, PartitionSpec(AXIS))

    def params(self, abstract: nnx.State) -> Any:
        """NamedShardings of a model's parameters, a tree like theirs.

        Raises:
          MimoError: if the devices cannot share the experts evenly.
        """
        check_divisible(abstract, self.mesh, TRAINING)
        return shardings(param_specs(abstract, TRAINING), self.mesh)

    def state(self, abstract: Any, params: nnx.State) -> Any:
        """NamedShardings of a training state: what the optimiser keeps of a parameter lies as it.

        Args:
          abstract: the state's shapes.
          params: the model's abstract parameters.
        """
        shapes, _ = jax.tree_util.tree_flatten_with_path(params)
        places = jax.tree.leaves(self.params(params))
        placed = {
            path_name(path): (leaf.shape, sharding)
            for (path, leaf), sharding in zip(shapes, places, strict=True)
        }

        def place(path, leaf):
            names = path_name(path).split(".")
            for first in range(len(names)):
                shape, sharding = placed.get(".".join(names[first:]), (None, None))
                if shape == leaf.shape:
                    return sharding
            return self.whole

        return jax.tree_util.tree_map_with_path(place, abstract)

    def batch(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch on the devices, each with its share of the rows."""
        return jax.device_put(batch, self.rows)

    def abstract(self, shapes: Any, placed: Any) -> Any:
        """Shapes with their shardings, as a restored state needs them."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            placed,
        )
