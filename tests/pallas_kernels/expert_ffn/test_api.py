"""What the expert FFN's public function accepts, refuses and falls back to, in words."""

import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expert_cases import distance, oracle, random_experts, random_routing
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.choice import log_once
from pallas_kernels.expert_ffn import api, expert_ffn, pack_experts, unpack_experts

T, D, F, EXPERTS, CHOICES = 5, 256, 128, 6, 3
NEW_JAX = jax.__version_info__ >= (0, 11, 2)


@pytest.fixture
def case(rng):
    weights = random_experts(rng, EXPERTS, D, F)
    ids, routing = random_routing(rng, T, CHOICES, EXPERTS)
    x = jnp.asarray(rng.normal(size=(T, D)), jnp.bfloat16)
    return x, weights, jnp.asarray(ids), jnp.asarray(routing)


@pytest.fixture
def packed_case(case):
    x, weights, *rest = case
    return x, jax.jit(pack_experts)(weights), *rest


def test_packed_weights_come_back_exactly(case):
    weights = case[1]
    fields = jax.jit(lambda w: unpack_experts(pack_experts(w)))(weights)
    for name, field in zip(("gate_up", "down", "gate_up_scale", "down_scale"), fields, strict=True):
        np.testing.assert_array_equal(field, getattr(weights, name))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_packed_weights_on_a_cpu_run_the_reference(implementation, case, packed_case):
    run = functools.partial(expert_ffn, implementation=implementation)
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("model",))
    spec = PartitionSpec()
    sharded = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    wide = packed_case[0].astype(jnp.float32)  # Hidden values are rounded to x's type.
    assert distance(jax.jit(sharded)(wide, *packed_case[1:]), oracle(*case)) < 1e-5
    np.testing.assert_array_equal(jax.jit(run)(*packed_case), jax.jit(run)(*case))


def test_sums_come_in_the_type_that_is_asked_for(case, rng):
    x, *rest = case
    residual = jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16)
    y = expert_ffn(x, *rest)
    for added, kind, wanted in (
        (None, jnp.bfloat16, y),
        (residual, None, residual.astype(jnp.float32) + y),
        (residual, jnp.float32, residual.astype(jnp.float32) + y),
    ):
        out = expert_ffn(x, *rest, residual=added, out_dtype=kind)
        assert out.dtype == (kind or jnp.bfloat16)
        np.testing.assert_array_equal(out, wanted.astype(out.dtype))
    with pytest.raises(ValueError, match="out_dtype is float16; it must be float32 or bfloat16"):
        expert_ffn(x, *rest, out_dtype=jnp.float16)


def test_the_kernel_by_name_needs_packed_weights(case):
    with pytest.raises(ValueError, match="pack them once, at load, with pack_experts"):
        expert_ffn(*case, implementation="mosaic_gpu")


def test_the_kernel_by_name_refuses_dense_weights(case):
    x, weights, *rest = case
    dense = api.ExpertWeights(jnp.zeros((EXPERTS, 2, F, D)), jnp.zeros((EXPERTS, D, F)))
    with pytest.raises(ValueError, match="dense"):
        expert_ffn(x, dense, *rest, implementation="mosaic_gpu")


def test_the_kernel_by_name_needs_bfloat16(packed_case):
    x, *rest = packed_case
    with pytest.raises(ValueError, match="takes x in bfloat16, not float32"):
        expert_ffn(x.astype(jnp.float32), *rest, implementation="mosaic_gpu")


def test_the_kernel_by_name_bounds_its_work_list(packed_case):
    x, weights, ids, routing = packed_case
    times = api.MOST_CHOICES // ids.size + 1
    many = [jnp.tile(a, (times, 1)) for a in (x, ids, routing)]
    with pytest.raises(ValueError, match="at most 32768 choices"):
        expert_ffn(many[0], weights, *many[1:], implementation="mosaic_gpu")


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU says")
def test_the_kernel_by_name_refuses_a_cpu_in_words(packed_case):
    run = jax.jit(functools.partial(expert_ffn, implementation="mosaic_gpu"))
    words = "this program is for cpu" if NEW_JAX else "needs jax >= 0.11.2, on Python 3.12"
    with pytest.raises(NotImplementedError, match=words):
        run(*packed_case)


def pretend_gpu(monkeypatch, capability):
    device = types.SimpleNamespace(device_kind="NVIDIA A100", compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    log_once.cache_clear()


@pytest.mark.skipif(not NEW_JAX, reason="older jax is refused before the GPU")
def test_another_gpu_is_refused_by_name_and_logged_once_by_auto(packed_case, monkeypatch, caplog):
    pretend_gpu(monkeypatch, "8.0")
    with pytest.raises(NotImplementedError, match="NVIDIA A100 has 8.0"):
        expert_ffn(*packed_case, implementation="mosaic_gpu")
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        for _ in range(3):
            jax.eval_shape(lambda *args: expert_ffn(*args), *packed_case)
    assert len(caplog.records) == 1 and "8.0" in caplog.text


def test_unpacked_weights_on_a_gpu_are_logged_once(case, monkeypatch, caplog):
    pretend_gpu(monkeypatch, "9.0")
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        for _ in range(2):
            jax.eval_shape(lambda *args: expert_ffn(*args), *case)
    assert len(caplog.records) == 1 and "pack_experts" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(implementation="triton"), "is not one of"),
        (dict(d=D + 32), "are for gate/up"),
        (dict(t=T + 1), "must be"),
    ],
)
def test_what_does_not_fit_is_refused(change, words, packed_case):
    x, weights, ids, routing = packed_case
    x = jnp.zeros((change.get("t", T), change.get("d", D)), jnp.bfloat16)
    with pytest.raises(ValueError, match=words):
        api.expert_ffn.__wrapped__(
            x, weights, ids, routing, implementation=change.get("implementation", "auto")
        )
