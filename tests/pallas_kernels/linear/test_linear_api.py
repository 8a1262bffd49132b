"""What the few-token linear's public function accepts, refuses and falls back to, in words."""

import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from linear_cases import CODES, oracle, random_case

from pallas_kernels.choice import log_once
from pallas_kernels.linear import api, linear
from pallas_kernels.linear.plan import Plan

NEW_JAX = jax.__version_info__ >= (0, 11, 2)


@pytest.fixture
def fp8(rng):
    x, weight, scale, norm = random_case(rng, Plan(192, 256, 1, 1, 4), 5)
    return jnp.asarray(x), jnp.asarray(weight), jnp.asarray(scale), jnp.asarray(norm)


def distance(out, ref):
    return np.linalg.norm(np.asarray(out, np.float64) - ref) / np.linalg.norm(ref)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_cpu_runs_the_reference(implementation, fp8):
    run = functools.partial(linear, out_dtype=jnp.float32, implementation=implementation)
    mesh = Mesh(np.array(jax.devices("cpu")[:1]), ("model",))
    spec = PartitionSpec()
    sharded = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x, weight, scale, norm = fp8
    expected = oracle(*map(np.asarray, (x, weight, scale)))
    assert distance(jax.jit(sharded)(x, weight, scale), expected) < 1e-5
    expected = oracle(*map(np.asarray, (x, weight, scale, norm)), 1e-3)
    normed = jax.jit(functools.partial(run, norm=norm, epsilon=1e-3))(x, weight, scale)
    assert distance(normed, expected) < 4e-3


def test_the_result_has_the_type_asked_for(fp8):
    x, weight, scale, _ = fp8
    assert linear(x, weight, scale).dtype == jnp.bfloat16
    wide = weight.astype(jnp.bfloat16)
    assert linear(x, wide, out_dtype=jnp.float32).dtype == jnp.float32


def test_the_kernel_by_name_needs_bfloat16(fp8):
    x, weight, scale, _ = fp8
    with pytest.raises(ValueError, match="takes x in bfloat16, not float32"):
        linear(x.astype(jnp.float32), weight, scale, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="takes weights in bfloat16 or float8_e4m3fn, not float32"):
        linear(x, weight.astype(jnp.float32), implementation="mosaic_gpu")


def test_the_kernel_by_name_is_for_few_tokens(fp8):
    _, weight, scale, _ = fp8
    x = jnp.ones((17, 256), jnp.bfloat16)
    with pytest.raises(ValueError, match="takes 1 to 16 tokens, not 17"):
        linear(x, weight, scale, implementation="mosaic_gpu")


def test_the_kernel_by_name_refuses_what_it_cannot_cut():
    with pytest.raises(ValueError, match=r"no way to cut bfloat16 weights \(64, 448\)"):
        linear(
            jnp.ones((2, 448), jnp.bfloat16),
            jnp.ones((64, 448), jnp.bfloat16),
            implementation="mosaic_gpu",
        )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what a CPU says")
def test_the_kernel_by_name_refuses_a_cpu_in_words(fp8):
    run = jax.jit(functools.partial(linear, implementation="mosaic_gpu"))
    words = "this program is for cpu" if NEW_JAX else "needs jax >= 0.11.2, on Python 3.12"
    with pytest.raises(NotImplementedError, match=words):
        run(*fp8[:3])


@pytest.mark.skipif(not NEW_JAX, reason="older jax is refused before the GPU")
def test_another_gpu_is_logged_once_by_auto(fp8, monkeypatch, caplog):
    device = types.SimpleNamespace(device_kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    log_once.cache_clear()
    with caplog.at_level(logging.WARNING, "pallas_kernels"):
        for _ in range(3):
            jax.eval_shape(linear, *fp8[:3])
    assert len(caplog.records) == 1 and "NVIDIA A100 has 8.0" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(implementation="triton"), "is not one of"),
        (dict(x=jnp.ones((3, 128), jnp.bfloat16)), r"must be \[t, d\] and \[n, d\]"),
        (dict(norm=jnp.ones(128, jnp.bfloat16)), r"needs bfloat16 \(256,\)"),
        (dict(out_dtype=jnp.float16), "is not bfloat16 or float32"),
        (dict(scale=None), "scale is missing"),
        (dict(weight=jnp.ones((192, 256), jnp.bfloat16)), "scale is given"),
        (dict(scale=jnp.ones((2, 2))), r"\(3, 2\)"),
        (dict(scale=jnp.ones((3, 2), jnp.bfloat16)), "scale is bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    arguments = dict(
        x=jnp.ones((3, 256), jnp.bfloat16),
        weight=jnp.ones((192, 256), CODES),
        scale=jnp.ones((3, 2)),
    )
    with pytest.raises(ValueError, match=words):
        api.linear.__wrapped__(**{**arguments, **change})
