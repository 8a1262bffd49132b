"""The public face of sums over devices, on eight virtual CPUs; the plumbing in `Parallel`."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mimo_jax.sharding import AXIS, Parallel
from pallas_kernels.all_sum import all_gather, all_sum, has_mail, misfit, open_mail
from pallas_kernels.all_sum.mail import Mail
from pallas_kernels.all_sum.shapes import SHAPES
from pallas_kernels.choice import kernel_absence

DTYPES = (jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint32)
WORDS = Mail.holding(8, 1 << 16).words


def over(devices: int, function):
    """Runs function(a device's part) on each of the devices; results side by side."""
    mesh = Mesh(np.array(jax.devices("cpu")[:devices]), (AXIS,))
    return jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=False)
    )


def draw(rng, devices, shape, dtype):
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, 1 << 31, (devices, *shape)), dtype)
    return jnp.asarray(rng.standard_normal((devices, *shape)), dtype)


def in_order(parts):
    """The sum in float32, one after another, rounded once; of integers modulo 2^32."""
    if parts.dtype in (np.int32, np.uint32):
        return parts.sum(0, dtype=parts.dtype)
    wide = parts.astype(np.float32)
    return functools.reduce(np.add, list(wide)).astype(parts.dtype)


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_sums_in_the_order_of_ranks_and_gathers(implementation, dtype, devices, rng):
    x, (residual,) = draw(rng, devices, (3, 5), dtype), draw(rng, 1, (3, 5), dtype)

    def both(x):
        mail = open_mail(AXIS, 1 << 16, implementation=implementation)
        plain = functools.partial(all_sum, axis=AXIS, implementation=implementation)
        total, mail = plain(x[0], mail)
        added, mail = plain(x[0], mail, residual=residual)
        parts, mail = all_gather(x[0], mail, AXIS, implementation=implementation)
        return total[None], added[None], parts[None]

    totals, added, parts = map(np.asarray, over(devices, both)(x))
    for rank in range(devices):
        np.testing.assert_array_equal(totals[rank], in_order(np.asarray(x)))
        np.testing.assert_array_equal(added[rank], in_order(np.stack([*x, residual])))
        np.testing.assert_array_equal(parts[rank], x)


@pytest.mark.parametrize("name", SHAPES)
def test_the_default_mailbox_takes_all_shapes(name):
    shape = SHAPES[name]
    x = jax.ShapeDtypeStruct(shape.shape, shape.dtype)
    assert misfit(x, Mail.holding(8, 16 * 6144 * 4).words, 8) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((2,), jnp.float16, "takes float32, bfloat16, int32, uint32, not float16"),
        ((1 << 15,), jnp.float32, r"float32 \(32768,\) with a mailbox of 4096 threads"),
        ((1 << 14,), jnp.int32, r"int32 \(16384,\) with a mailbox"),
        ((0, 4), jnp.float32, r"float32 \(0, 4\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(shape, dtype, words):
    with pytest.raises(ValueError, match=words):
        raise misfit(jax.ShapeDtypeStruct(shape, dtype), WORDS, 8)


@pytest.mark.parametrize(("shape", "dtype"), [((1 << 14,), jnp.float32), ((1 << 13,), jnp.int32)])
def test_the_largest_that_fit(shape, dtype):
    assert misfit(jax.ShapeDtypeStruct(shape, dtype), WORDS, 8) is None


def test_a_residual_of_another_type_is_refused(rng):
    def wrong(x):
        mail = jnp.zeros(WORDS, jnp.uint32)
        return all_sum(x, mail, AXIS, residual=x.astype(jnp.bfloat16))[0]

    with pytest.raises(ValueError, match=r"residual is bfloat16 \(1, 2\); x is float32 \(1, 2\)"):
        over(8, wrong)(draw(rng, 8, (2,), jnp.float32))


def test_an_unknown_implementation_is_refused(rng):
    def wrong(x):
        return all_sum(x, jnp.zeros(WORDS, jnp.uint32), AXIS, implementation="nccl")[0]

    with pytest.raises(ValueError, match="implementation='nccl' is not one of"):
        over(8, wrong)(draw(rng, 8, (2,), jnp.float32))


@pytest.mark.skipif(bool(kernel_absence()), reason=str(kernel_absence()))
def test_the_kernel_by_name_refuses_another_platform(rng):
    def named(x):
        return all_sum(x, jnp.zeros(WORDS, jnp.uint32), AXIS, implementation="mosaic_gpu")[0]

    with pytest.raises(NotImplementedError, match="runs on Hopper GPUs; this program is for cpu"):
        over(8, named)(draw(rng, 8, (2,), jnp.float32))


def test_meshes_that_have_mailboxes():
    assert not has_mail([0]) and not has_mail(range(9)) and not has_mail([1, 0])
    assert has_mail(range(8)) == (kernel_absence() is None)


@pytest.mark.skipif(not hasattr(jax, "new_ref"), reason="needs jax.new_ref")
def test_parallel_by_mail_does_what_it_does_without(rng):
    """In loops, branches and functions jitted apart; lists of arrays go in one exchange."""
    x = draw(rng, 4, (2, 6), jnp.float32)

    def work(parallel, x):
        @jax.jit
        def block(x):
            return parallel.sum(x * 0.5)

        def body(carry):
            left, x = carry
            x = lax.cond(left % 2 == 0, block, lambda x: block(block(x)), x)
            many = parallel.gather(x.astype(jnp.bfloat16), -1).astype(jnp.float32)
            both = parallel.sum([many[:, :2], x.sum(axis=1)])
            many = parallel.add(many, lambda own: many * 0.1 + (0 if own is None else own))
            x = x / (1 + jnp.abs(both[1])[:, None]) + both[0][:, :1] + many[:, 1:2]
            return left - 1, x

        x = lax.while_loop(lambda carry: carry[0] > 0, body, (jnp.int32(5), x))[1]
        return x, parallel.sum(jnp.arange(3, dtype=jnp.uint32)) * parallel.sum(1)

    def run(by_mail, x):
        parallel = Parallel(AXIS)
        found = work(parallel.with_mail() if by_mail else parallel, x[0])
        return jax.tree.map(lambda a: a[None], found)

    with_mail, without = (over(4, functools.partial(run, by_mail))(x) for by_mail in (True, False))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6), with_mail, without)


def test_without_a_mailbox_or_too_large_it_is_xlas_sum(rng):
    x = draw(rng, 8, (1 << 18,), jnp.bfloat16)

    def run(x):
        parallel = Parallel(AXIS).with_mail() if hasattr(jax, "new_ref") else Parallel(AXIS)
        return parallel.sum(x)

    text = str(jax.make_jaxpr(over(8, run))(x))
    assert "psum" in text and "all_gather" not in text


def test_one_sum_of_bfloat16_differs_from_a_sum_in_bfloat16():
    """The reference adds in float32: the third 1 is not lost."""
    parts = np.array([256, 1, 1, 1], ml_dtypes.bfloat16)[:, None]

    def run(x):
        return all_sum(
            x, jnp.zeros(Mail.holding(4, 64).words, jnp.uint32), AXIS, implementation="reference"
        )[0]

    assert float(over(4, run)(jnp.asarray(parts))[0, 0]) == 260
