"""Muon for matrices, AdamW for the rest, and the learning rate's schedule."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

_NOT_MUON = ("embedding", "head", "router", "mask_embedding")


def schedule(peak: float, steps: int, warmup: int, decay: int) -> optax.Schedule:
    """Linear warm-up, a plateau, and a linear decay to zero over the last `decay` of `steps`."""
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay),
        ],
        [warmup, steps - decay],
    )


def make_optimizer(
    learning_rate: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    """Muon (arXiv 2502.16982's scaling, so that one learning rate serves both) with clipping.

    Matrices are the last two dimensions, [out, in]; those before them count matrices. Embedding,
    head, router, norms and sinks go to AdamW.
    """
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            learning_rate,
            weight_decay=weight_decay,
            adam_b2=0.95,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        ),
    )

    def update(*args, **kwargs):
        # optax raises floats to int32 powers, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(*args, **kwargs)

    return optax.GradientTransformation(chain.init, update)


def _matrices(params):
    def dimensions(path, value):
        names = {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
        if value.ndim < 2 or names & set(_NOT_MUON):
            return None
        return MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)

    return jax.tree_util.tree_map_with_path(dimensions, params)
