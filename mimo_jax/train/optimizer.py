"""Muon for matrices and AdamW for the rest, or AdamW alone; the learning rate's schedule.

Both are made once for the same settings: what was compiled with them serves the next run too.
"""

from functools import lru_cache

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from mimo_jax.train.config import OptimizerSection, ScheduleSection

_NOT_MUON = ("embedding", "head", "router", "mask_embedding")


@lru_cache(maxsize=32)
def make_schedule(section: ScheduleSection, peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up, then a plateau that falls linearly to zero, half a cosine, or neither.

    Args:
      section: kind and shares.
      peak: the largest learning rate.
      steps: of the whole run.
    """
    warmup = max(1, round(section.warmup * steps))
    rise = optax.linear_schedule(0.0, peak, warmup)
    if section.kind == "constant":
        return optax.join_schedules([rise, optax.constant_schedule(peak)], [warmup])
    if section.kind == "cosine":
        fall = optax.cosine_decay_schedule(peak, max(1, steps - warmup))
        return optax.join_schedules([rise, fall], [warmup])
    decay = max(1, min(round(section.decay * steps), steps - warmup))
    plateau, fall = optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, decay)
    return optax.join_schedules([rise, plateau, fall], [warmup, steps - decay])


@lru_cache(maxsize=32)
def make_optimizer(
    learning_rate: optax.Schedule, section: OptimizerSection
) -> optax.GradientTransformation:
    """The optimiser, after clipping by the norm of the whole gradient (clip 0: none).

    Muon has the scaling of arXiv 2502.16982, so that one learning rate serves both. Matrices are
    the last two dimensions, [out, in]; those before them count matrices. Embedding, head, router,
    norms and sinks go to AdamW.
    """
    if section.name == "muon":
        core = muon(
            learning_rate,
            weight_decay=section.weight_decay,
            adam_b1=section.beta1,
            adam_b2=section.beta2,
            muon_weight_dimension_numbers=_matrices,
            consistent_rms=0.2,
        )
    else:
        core = optax.adamw(
            learning_rate,
            b1=section.beta1,
            b2=section.beta2,
            weight_decay=section.weight_decay,
            mask=_decayed,
        )
    clip = [optax.clip_by_global_norm(section.clip)] if section.clip else []
    chain = optax.chain(*clip, core)

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


def _decayed(params):
    """Norms, sinks and biases are not pulled to zero."""
    return jax.tree.map(lambda value: value.ndim >= 2, params)
