"""What blocks do together in plain jnp, for Pallas' interpreter on a CPU."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.reference import block_attention_reference
from pallas_kernels.attention_layer.exchange import Exchange


@dataclasses.dataclass(frozen=True)
class Together:
    """The hooks of `lanes.Together`; blocks run one after another, so that none waits for others.

    Instead the launch is run several times, each with what the one before wrote.
    """

    blocks: int
    exchange: Exchange

    def outputs(self, layer) -> dict:
        """Projection and heads, for the next launch to see."""
        part, t = self.exchange, layer.ring.b * layer.ring.t
        return dict(
            qkv=jax.ShapeDtypeStruct((1, t, part.rows), jnp.bfloat16),
            heads=jax.ShapeDtypeStruct((t, part.columns), jnp.bfloat16),
        )

    def exchanged(self, refs) -> dict:
        """What is written of the projection, and seen of the heads."""
        return dict(qkv=refs["qkv"], heads=refs["heads_seen"])

    def begin(self, refs, block):
        """There are no halves."""

    def take(self, ring, refs, block):
        """Nothing: `attend` reads what it needs."""

    def bring(self, ring, refs, block):
        """Nothing: the interpreter has no caches."""

    def attend(self, ring, refs, block):
        """A tile's rows of the reference's heads; the caches stay as they are."""
        plgpu.barrier_wait(refs["projected"].at[0])
        group = lax.axis_index("wg")
        qkv = refs["qkv_seen"][...].reshape(ring.b, ring.t, ring.k, -1)
        names = ("cos", "sin", "keys", "values", "start", "live")
        sink = refs["sink"][...] if "sink" in refs else None
        options = dict(window=ring.window, value_scale=ring.scale)
        held = [refs[name][...] for name in names]
        heads, *_ = block_attention_reference(qkv, *held, sink, **options)
        heads = heads.astype(jnp.bfloat16)
        tile, head = lax.rem(block, ring.tiles), lax.div(block, ring.tiles)
        sequence, kv = lax.div(head, ring.k), lax.rem(head, ring.k)
        for i in range(ring.rows):
            row = tile * ring.rows + i
            token, own = lax.div(row, ring.group), kv * ring.group + lax.rem(row, ring.group)

            def write(token=token, own=own):
                at, first = sequence * ring.t + token, own * ring.v
                refs["heads"][at, pl.ds(first, ring.v)] = heads[sequence, token, own]

            pl.when((row < ring.t * ring.group) & (group == 0))(write)
