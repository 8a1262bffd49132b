"""Output projections in FP8: quantised on the mesh as in numpy, and used wherever they are read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerances import assert_close

from mimo_jax.decode.options import Options
from mimo_jax.decode.output_fp8 import output_fp8_plan, quantize_output_params
from mimo_jax.decode.program import Settings, make_plan, make_program, make_state
from mimo_jax.errors import MimoError
from mimo_jax.model.mimo import MiMo
from mimo_jax.presets import preset
from mimo_jax.quant import fp8
from mimo_jax.sharding import make_mesh

# The output projections are [256, 512].
CONFIG = dataclasses.replace(
    preset("mimo-nano"),
    num_hidden_layers=2,
    hybrid_layer_pattern=(0, 1),
    moe_layer_freq=(0, 1),
    v_head_dim=64,
    swa_v_head_dim=64,
)


def make(devices: int):
    return make_plan(CONFIG, None, make_mesh(devices), packed=False, dtype=jnp.bfloat16)


def run(plan, params, prompt):
    """Tokens and caches after prefill of the prompt and seven decoded tokens."""
    settings = Settings(batch=1, max_len=40, block=1, chunk=64, dtype=jnp.bfloat16)
    state = make_state(plan, settings)
    rows = np.zeros(state.tokens.shape, np.int32)
    rows[0, : len(prompt)] = prompt
    fields = dict(tokens=rows, length=np.full(1, len(prompt), np.int32))
    places = {name: getattr(state, name).sharding for name in fields}
    state = dataclasses.replace(state, **jax.device_put(fields, places))
    limit = np.full(1, len(prompt) + 7)
    request = Options(ignore_eos=True).request(limit, limit, (), plan.mesh)
    return jax.device_get(make_program(plan, settings)(params, state, request))


@pytest.mark.parametrize("devices", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_quantised_model_computes_with_the_decoded_codes(devices, rng):
    """Against a model in bfloat16 whose output projections are the codes' values."""
    plan = make(devices)
    rewritten = output_fp8_plan(plan)
    make_model = dict(shards=devices, packed=False, dtype=jnp.bfloat16)
    model = MiMo(CONFIG, nnx.Rngs(int(rng.integers(99))), **make_model)
    stored = [np.asarray(layer.attention.output[...]) for layer in model.layers]
    params = jax.device_put(nnx.state(model), plan.param_shardings[0]), None
    params = quantize_output_params(plan, rewritten, params)
    jax.tree.map(lambda leaf, like: leaf.shape == like.shape or 1 / 0, params, rewritten.params)

    for number, layer in enumerate(model.layers):
        quantised = params[0]["layers"][number]["attention"]
        codes, scales = np.asarray(quantised["output"]), np.asarray(quantised["output_scale"])
        _, expected = fp8.quantize(stored[number])
        assert scales.shape == expected.shape == (2, 4)
        np.testing.assert_allclose(scales, expected, rtol=1e-6)
        values = fp8.decode_on_host(codes, scales, fp8.TILE, jnp.bfloat16)
        assert_close(values, stored[number], "fp8 weights")
        layer.attention.output = nnx.Param(jnp.asarray(values), logical_axes=(None, "heads"))
    decoded = jax.device_put(nnx.state(model), plan.param_shardings[0]), None
    prompt = rng.integers(0, CONFIG.vocab_size, 19)
    found, wanted = run(rewritten, params, prompt), run(plan, decoded, prompt)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert found.length[0] == 26 and found.caches[-1].keys[0, :, 24].any()


def test_a_mesh_that_would_cut_a_tile_is_refused():
    with pytest.raises(MimoError, match="each of 8 devices has 64 columns of layer 0's output"):
        output_fp8_plan(make(8))
