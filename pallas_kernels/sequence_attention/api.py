"""The public face of sequences' attention: argument checks, implementations, the gradient."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.sequence_attention import triton
from pallas_kernels.sequence_attention.reference import sequence_attention_reference

IMPLEMENTATIONS = ("reference", "triton", "interpreted")


def sequence_attention(
    q: Float[Array, "b k g t h"],
    k: Float[Array, "b k t h"],
    v: Float[Array, "b k t v"],
    sink: Float[Array, "k g"],
    *,
    window: int | None = None,
    implementation: str = "triton",
) -> Float[Array, "b k g t v"]:
    """Softmax attention of tokens to themselves and those before; differentiable in all arrays.

    Args:
      q: queries, [batch, key/value heads, query heads of each, positions, size].
      k: keys.
      v: values.
      sink: float32; an unscaled logit a query head, which takes mass and adds no value.
      window: keys that a query sees, its own included; None is all before it.
      implementation: "triton", kernels for GPUs; "interpreted", the same on any device, slowly;
        "reference", plain jnp in float32.

    Returns:
      in q's dtype.

    Raises:
      ValueError: on an unknown implementation, or shapes or types that the kernels do not take.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}.")
    if implementation == "reference":
        return sequence_attention_reference(q, k, v, sink, window).astype(q.dtype)
    if (refusal := misfit(q, k, v)) is not None:
        raise refusal
    return _attend(q, k, v, sink, window, implementation == "interpreted")


def misfit(q, k, v) -> ValueError | None:
    """Why the kernels do not take such arrays; None if they do."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.bfloat16, jnp.float32):
        return ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: the kernels take bfloat16 or "
            "float32, the same for all."
        )
    if q.shape[3] % triton.BLOCK or k.shape[2] != q.shape[3]:
        return ValueError(
            f"Sequences of {q.shape[3]} queries and {k.shape[2]} keys: the kernels take as many of "
            f"both, a multiple of {triton.BLOCK}."
        )
    if max(q.shape[4], v.shape[3]) > triton.LARGEST:
        return ValueError(
            f"Heads of {q.shape[4]} and {v.shape[3]}: the kernels take at most {triton.LARGEST}."
        )
    return None


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, sink, window, interpret):
    return _forward(q, k, v, sink, window, interpret)[0]


def _forward(q, k, v, sink, window, interpret):
    merged = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    plain, logs = triton.forward(*merged, window, interpret)
    plain, logs = plain.reshape(*q.shape[:4], -1), logs.reshape(q.shape[:4])
    # The sink is one more weight beside those of the keys.
    sums = jnp.logaddexp(logs, sink[None, :, :, None])
    out = (plain * jnp.exp(logs - sums)[..., None]).astype(q.dtype)
    return out, (q, k, v, sink, out, sums)


def _backward(window, interpret, saved, gradient):
    q, k, v, sink, out, sums = saved
    # The gradient of a softmax: what a weight's value exceeds the weighted mean by.
    mean = (gradient.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1)
    merged = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v, gradient, sums, mean)]
    of_q, of_k, of_v = triton.backward(*merged, window, interpret)
    of_sink = -(jnp.exp(sink[None, :, :, None] - sums) * mean).sum(axis=(0, 3))
    return of_q.reshape(q.shape), of_k.reshape(k.shape), of_v.reshape(v.shape), of_sink


_attend.defvjp(_forward, _backward)
