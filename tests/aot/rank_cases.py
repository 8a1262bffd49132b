"""The decode programs of one rank of MiMo-V2.6-Pro that test_rank_h200.py compiles."""

import dataclasses

import jax.numpy as jnp
from cases import program

from mimo_jax.bench.rank_profile import OPTIONS
from mimo_jax.bench.rank_run import shorten
from mimo_jax.decode.kernel_weights import kernel_plan
from mimo_jax.decode.program import Settings, make_plan
from mimo_jax.decode.rank import rank_plan
from mimo_jax.planning.sizes import abstract_mesh
from mimo_jax.presets import drafter_preset, preset

LAYERS = 9


def rank(mesh, block: int, max_len: int, **changes):
    """The first layers of a rank of eight, weights as released, experts on their kernel."""
    name = "mimo-v2.6-pro"
    config, drafter = shorten(preset(name), drafter_preset(name), LAYERS)
    drafter = drafter if block > 1 else None
    whole = make_plan(config, drafter, abstract_mesh(8), fp8=True, dtype=jnp.bfloat16)
    plan = dataclasses.replace(rank_plan(kernel_plan(whole), mesh), **changes)
    case = program(plan, Settings(1, max_len, block, 0, jnp.bfloat16))
    return dataclasses.replace(case, options=case.options | OPTIONS)


def drafted(mesh):
    """A block of eight, drafted."""
    return rank(mesh, 8, 1024)


def drafted_long(mesh):
    """The same with the longest context."""
    return rank(mesh, 8, 1 << 20)


def plain(mesh):
    """One token, no drafter."""
    return rank(mesh, 1, 1024)


def drafted_whole(mesh):
    """A block of eight, a window layer's attention in one launch."""
    return rank(mesh, 8, 1024, whole_layers=True)
