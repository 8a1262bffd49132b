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
from mimo_jax.model.dflash import Drafter
from mimo_jax.model.mimo import MiMo
from mimo_jax.planning.sizes import abstract_mesh, needs
from mimo_jax.presets import drafter_preset, preset
from mimo_jax.sharding import Parallel, make_mesh
from pallas_kernels.expert_ffn import BARRIER_WORDS

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
            # With words for the layers whose attention may be one launch.
            shapes = [jax.tree.map(lambda x: x.shape, own) for own in (params, packed.params)]
            assert shapes[0] == shapes[1]
            barrier = params[0]["layers"][1]["ffn"]["experts"]["barrier"]
            assert barrier.shape[0] > BARRIER_WORDS and not barrier[...].any()
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


def drafted(plan, seed):
    """A random target, and a drafter whose norms and sinks are random too."""
    drafter = Drafter(plan.drafter, nnx.Rngs(seed), shards=plan.shards, dtype=jnp.bfloat16)
    key = iter(jax.random.split(jax.random.key(seed), 99))
    state = jax.tree.map(
        lambda x: x if x.ndim > 1 else x + jax.random.normal(next(key), x.shape).astype(x.dtype),
        nnx.state(drafter),
    )
    return values(plan, seed)[0], jax.device_put(state, plan.param_shardings[1])


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_packed_drafter_has_one_product_for_all_contexts(devices, rng):
    """On each device its own groups; the weights are the same ones, in another order."""
    mesh = make_mesh(devices)
    plan = make_plan(
        preset("mimo-nano"), drafter_preset("mimo-nano"), mesh, packed=True, dtype=jnp.bfloat16
    )
    packed, params = kernel_plan(plan), drafted(plan, int(rng.integers(1000)))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(params[1]))
    _, found = pack_params(plan, packed, params)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), found, packed.params[1])
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(found))
    own = [layer["attention"] for layer in before["layers"].values()]
    for old, layer in zip(own, after["layers"].values(), strict=True):
        new = layer["attention"]
        assert not {"query", "kv"} & set(new)
        groups = old["kv"].shape[0]
        for group, rows in enumerate(np.split(old["query"], groups)):
            right = np.concatenate([rows, old["kv"][group]])
            np.testing.assert_array_equal(new["qkv"][group], right)
        np.testing.assert_array_equal(new["output"], old["output"])
    np.testing.assert_array_equal(after["context_kv"], np.stack([a["kv"] for a in own]))
    norms = np.stack([a["key_norm"]["weight"] for a in own])
    np.testing.assert_array_equal(after["context_norms"], norms)


def test_a_packed_plan_can_be_weighed():
    """Room for sequences is asked for beside weights in the kernels' order, too."""
    both = preset("mimo-v2.6-pro"), drafter_preset("mimo-v2.6-pro")
    plan = make_plan(*both, abstract_mesh(8), packed=True, fp8=True, dtype=jnp.bfloat16)
    settings = Settings(batch=3, max_len=4099, block=8, chunk=256, dtype=jnp.bfloat16)
    loaded, packed = (needs(p, settings) for p in (plan, kernel_plan(plan)))
    assert loaded["caches"] == packed["caches"]
    weights = [sum(parts["weights"].values()) for parts in (loaded, packed)]
    assert 0 < weights[1] / weights[0] - 1 < 1e-3  # Words to count in, and the drafter's twice.


def run_drafter(drafter, rng):
    """Hidden rows of a block, and the contexts that it saw."""
    config, b, t = drafter_preset("mimo-nano"), 2, 8
    taps = len(config.target_layer_ids) * config.hidden_size
    features = jnp.asarray(rng.normal(size=(b, t, taps)), jnp.bfloat16)
    options = dict(batch=b, max_len=64, block=t, shards=1, dtype=jnp.bfloat16)
    contexts = Drafter.init_contexts(config, **options)
    start, live = jnp.array([5, 30], jnp.int32), jnp.ones((b, t), bool)
    contexts = drafter.ingest(features, start, live, contexts, Parallel())
    block = jnp.asarray(rng.normal(size=(b, t, config.hidden_size)), jnp.bfloat16)
    places = tuple(context.positions(start + t) for context in contexts)
    return drafter(block, start + t, contexts, places, decoding=True), contexts


@pytest.mark.parametrize("swapped", [False, True])
def test_a_packed_drafter_drafts_likewise(swapped, rng):
    seed = int(rng.integers(1000))
    config, found = drafter_preset("mimo-nano"), []
    for packed in (False, True):
        drafter = Drafter(config, nnx.Rngs(seed), dtype=jnp.bfloat16)
        if packed:
            drafter.pack()
        if packed and swapped:
            drafter.context_kv[...] = drafter.context_kv[...][::-1]
        hidden, contexts = run_drafter(drafter, np.random.default_rng(seed))
        arrays = [hidden, *(x for context in contexts for x in (context.keys, context.values))]
        found.append([np.asarray(x, np.float64) for x in arrays])
    apart = [np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(*found, strict=True)]
    assert all(np.linalg.norm(x) > 1 for x in found[0])
    assert (max(apart) < 1e-2) is not swapped, apart


def repack(engine):
    """Does to a loaded model what loading does for GPUs."""
    packed = kernel_plan(engine._plan)
    engine._params = pack_params(engine._plan, packed, engine._params)
    engine._plan, engine._idle = packed, None
    engine._programs.clear()
    engine._makers.clear()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_packed_model_answers_likewise(devices):
    """The trained model: the same tokens, and drafts that are as good."""
    options = dict(experts="packed", dtype=jnp.bfloat16, devices=devices, progress=False)
    with mimo_jax.load(NANO, **options) as engine:
        outputs = []
        for change in (lambda engine: None, repack):
            change(engine)
            outputs.append(engine.generate("def fibonacci(n):", max_tokens=40, ignore_eos=True))
    loaded, repacked = outputs
    assert repacked.tokens == loaded.tokens
    lengths = [output.stats.acceptance_length for output in outputs]
    assert lengths[0] > 2 and abs(lengths[1] / lengths[0] - 1) < 0.05, lengths


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
