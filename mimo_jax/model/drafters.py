"""The kinds of drafter behind one interface: all that the decoding loop asks of either."""

from typing import Any, Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax.drafter_config import AnyDrafterConfig, DrafterConfig, MTPConfig
from mimo_jax.model.dflash import Drafter
from mimo_jax.model.mimo import MiMo
from mimo_jax.model.mtp import MTP
from mimo_jax.sharding import Parallel


@runtime_checkable
class DrafterKind(Protocol):
    """A module that drafts. Its configuration names the target's layers that it taps.

    What it keeps of a sequence, its contexts, is a pytree of its own in the loop's state: of
    `LayerCache`s, divided as the target's, and of arrays that every device holds whole. The loop
    never looks into it. Rolling back is moving `start`: rows from there on do not count.
    """

    @staticmethod
    def init_contexts(
        config: Any, *, batch: int, max_len: int, block: int, shards: int, dtype: Any
    ) -> Any:
        """Empty contexts; the arguments are those of `decode.state.init_state`.

        Raises:
          MimoError: if the drafter cannot draft for a block of that size.
        """

    def ingest_prompt(
        self,
        model: MiMo,
        tokens: Int32[Array, "b l"],
        features: Float[Array, "b t _"],
        start: Int32[Array, "b"],
        live: Bool[Array, "b t"],
        contexts: Any,
        parallel: Parallel,
    ) -> Any:
        """Takes in a chunk of a prompt.

        Args:
          model: the target.
          tokens: the sequences, the whole prompt among them.
          features: the tapped layers' outputs of the chunk.
          start: position of each sequence's first row.
          live: rows that count, first in the chunk.
          contexts: to add to.
          parallel: this device's place on the mesh.

        Returns:
          the contexts.
        """

    def ingest(
        self,
        features: Float[Array, "b t _"],
        start: Int32[Array, "b"],
        live: Bool[Array, "b t"],
        contexts: Any,
        parallel: Parallel,
    ) -> Any:
        """Takes in the features of a verified block, of which any number of rows is kept."""

    def draft(
        self,
        model: MiMo,
        tokens: Int32[Array, "b l"],
        start: Int32[Array, "b"],
        contexts: Any,
        wanted: Int32[Array, ""],
        block: int,
        parallel: Parallel,
    ) -> tuple[Int32[Array, "b drafts"], Any]:
        """Drafts the tokens after each anchor.

        Args:
          model: the target, whose embedding and head drafters share.
          tokens: the sequences.
          start: the anchors' positions, which are the numbers of rows that count in the contexts.
          contexts: of the sequences.
          wanted: drafts that will be verified, the same on all devices; others may be left out.
          block: rows of a verified block, 2 or more.
          parallel: this device's place on the mesh.

        Returns:
          block - 1 drafts, of which those past `wanted` mean nothing; the contexts.
        """


_CLASSES: dict[type, Any] = {DrafterConfig: Drafter, MTPConfig: MTP}


def drafter_class(config: AnyDrafterConfig) -> type[DrafterKind]:
    """The module's class of a configuration."""
    return _CLASSES[type(config)]


def make_drafter(
    config: AnyDrafterConfig, rngs: nnx.Rngs, *, shards: int = 1, fp8: bool = False, dtype: Any
) -> Any:
    """The module of a configuration.

    Args:
      config: the shapes.
      rngs: streams of random keys for the initial values.
      shards: devices that key/value heads must be spread over.
      fp8: whether MTP layers have FP8 where the target has it; a DFlash drafter never does.
      dtype: of the other weights.
    """
    quantized = {"fp8": fp8} if isinstance(config, MTPConfig) else {}
    return _CLASSES[type(config)](config, rngs, shards=shards, dtype=dtype, **quantized)
