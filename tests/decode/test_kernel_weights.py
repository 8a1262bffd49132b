"""Experts in the kernel's order on a mesh give the state that they gave in the checkpoint's."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import mimo_jax
from mimo_jax import loading
from mimo_jax.decode.kernel_weights import kernel_plan, pack_params
from mimo_jax.decode.options import Options
from mimo_jax.decode.program import Settings, make_plan, make_program, make_state
from mimo_jax.model.mimo import MiMo
from mimo_jax.presets import preset
from mimo_jax.sharding import make_mesh

NANO = pathlib.Path(__file__).resolve().parents[2] / "checkpoints" / "mimo-nano"


def values(plan, seed):
    model = MiMo(plan.config, nnx.Rngs(seed), shards=plan.shards, packed=True, dtype=jnp.bfloat16)
    return jax.device_put(nnx.state(model), plan.param_shardings[0]), None


@pytest.mark.parametrize(
    ("devices", "layout"),
    [
        (2, "tensor"),
        pytest.param(4, "tensor", marks=pytest.mark.slow),
        pytest.param(1, "tensor", marks=pytest.mark.slow),
        pytest.param(2, "expert", marks=pytest.mark.slow),
    ],
)
def test_packed_experts_give_the_same_state(devices, layout, rng):
    mesh = make_mesh(devices)
    plan = make_plan(
        preset("mimo-nano"), None, mesh, layout=layout, packed=True, dtype=jnp.bfloat16
    )
    seed = int(rng.integers(1000))
    params = values(plan, seed)
    settings = Settings(batch=1, max_len=32, block=1, chunk=64, dtype=jnp.bfloat16)
    prompt = rng.integers(0, plan.config.vocab_size, 20)
    states = []
    # On a CPU whole layers are what they are without.
    packed = dataclasses.replace(kernel_plan(plan), whole_layers=True)
    for used in (plan, packed):
        if used is packed:
            params = pack_params(plan, packed, params)
        state = make_state(used, settings)
        rows = np.zeros(state.tokens.shape, np.int32)
        rows[0, :20] = prompt
        fields = dict(tokens=rows, length=np.full(1, 20, np.int32))
        places = {name: getattr(state, name).sharding for name in fields}
        state = dataclasses.replace(state, **jax.device_put(fields, places))
        request = Options(ignore_eos=True).request(np.full(1, 26), np.full(1, 26), (), mesh)
        state = make_program(used, settings)(params, state, request)
        states.append(jax.device_get(state))
    # Tokens, and the caches of all layers.
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert states[0].length[0] == 26 and states[0].caches[-1].keys[0, :, 24].any()


@pytest.mark.parametrize(
    ("kernel", "kernels", "whole"),
    [(True, True, False), (False, False, False), ("whole", True, True)],
)
def test_load_says_which_kernels_run(kernel, kernels, whole):
    with mimo_jax.load(NANO, kernel=kernel, progress=False) as engine:
        assert (engine._plan.kernels, engine._plan.whole_layers) == (kernels, whole)


@pytest.mark.parametrize(
    ("kernel", "dtype", "on_cpu", "absence", "stays"),
    [
        (True, jnp.bfloat16, False, None, True),
        (False, jnp.bfloat16, False, None, False),
        (True, jnp.float32, False, None, False),
        (True, jnp.bfloat16, False, NotImplementedError("another GPU"), False),
        (True, jnp.bfloat16, True, None, False),
    ],
)
def test_fp8_stays_by_itself_where_its_kernel_runs(
    kernel, dtype, on_cpu, absence, stays, monkeypatch
):
    monkeypatch.setattr(loading, "kernel_absence", lambda: absence)
    assert loading._keeps_fp8("auto", kernel, dtype, on_cpu) is stays
    assert loading._keeps_fp8("fp8", kernel, dtype, on_cpu)
    assert not loading._keeps_fp8("decoded", kernel, dtype, on_cpu)
