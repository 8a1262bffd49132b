"""What the arguments of attention must be, and which of them no kernel takes, in words."""

from collections.abc import Callable

import jax

from pallas_kernels.attention.shapes import block_sizes_of
from pallas_kernels.choice import kernel_absence


def check_arrays(q, keys, values, sink, holder: str, **numbers) -> None:
    """Shapes that mean something, whatever implementation runs; prefill's too.

    Args:
      q: [b, t, n, h].
      keys: [b, k, s, h].
      values: [b, k, s, v].
      sink: [n] or None.
      holder: what holds the keys, for messages.
      **numbers: arrays with a number for each sequence.

    Raises:
      ValueError: if they do not fit each other.
    """
    (b, _, n, h), (k, s) = q.shape, keys.shape[1:3]
    if keys.shape != (b, k, s, h) or values.shape[:3] != (b, k, s):
        raise ValueError(
            f"q {q.shape}, keys {keys.shape} and values {values.shape} must be [b, t, n, h], "
            "[b, k, s, h] and [b, k, s, v]."
        )
    if n % k:
        raise ValueError(f"q has {n} heads, the {holder} {k}: queries must divide among them.")
    if any(x.shape != (b,) for x in numbers.values()):
        shapes = ", ".join(f"{name} {x.shape}" for name, x in numbers.items())
        raise ValueError(f"{shapes} must be [{b}].")
    if sink is not None and sink.shape != (n,):
        raise ValueError(f"sink {sink.shape} must be [{n}].")


def check_decode(q, keys, values, start, live, window, sink) -> None:
    """Likewise for `api.decode_attention`: a cache also has rows enough."""
    check_arrays(q, keys, values, sink, "cache", start=start, live=live)
    t, s = q.shape[1], keys.shape[2]
    least = t if window is None else window + t - 1
    if s < least:
        kind = "a cache" if window is None else f"a ring for window {window}"
        raise ValueError(f"{kind} and a block of {t} needs {least} rows or more; this has {s}.")


def check_block(qkv, cos, sin, keys, values, start, live, window, sink) -> None:
    """Likewise for `api.block_attention`: a block as it was projected."""
    (b, t, k, rows), h, v = qkv.shape, keys.shape[3], values.shape[3]
    if (rows - v) % h or rows - v < 2 * h:
        raise ValueError(
            f"qkv {qkv.shape} must have whole queries and a key of {h} and a value of {v} for each "
            "key/value head."
        )
    if {str(cos.dtype), str(sin.dtype)} != {"float32"}:
        raise ValueError(f"cos and sin are {cos.dtype} and {sin.dtype}: they must be float32.")
    if cos.shape != sin.shape or cos.shape[:2] != (b, t) or not 1 <= cos.shape[2] <= h // 2:
        raise ValueError(
            f"cos {cos.shape} and sin {sin.shape} must be [{b}, {t}, r], r at most {h // 2}."
        )
    if keys.shape[1] != k:
        raise ValueError(f"qkv {qkv.shape} has {k} key/value heads, the cache {keys.shape[1]}.")
    n = block_sizes_of(qkv, keys, values)[2]
    queries = jax.ShapeDtypeStruct((b, t, n, h), qkv.dtype)
    check_decode(queries, keys, values, start, live, window, sink)


def check_draft(qkv, query_norm, key_norm, cos, sin, keys, values, start, window, sink) -> None:
    """Likewise for `api.draft_attention`: a block that is not in the ring."""
    check_block(qkv, cos, sin, keys, values, start, start, window, sink)
    t, h = qkv.shape[1], keys.shape[3]
    if query_norm.shape != (h,) or key_norm.shape != (h,):
        raise ValueError(
            f"query_norm {query_norm.shape} and key_norm {key_norm.shape} must be [{h}]."
        )
    if window < t:
        raise ValueError(f"window={window} must be at least t={t}.")


def check_context(kv, key_norms, cos, sin, keys, values, start, live) -> None:
    """Likewise for `api.write_context`: rows of several layers, and a ring of each."""
    (b, t, layers, k, width), h = kv.shape, key_norms.shape[-1]
    s, v = keys[0].shape[2] if keys else 0, width - h
    if {str(cos.dtype), str(sin.dtype)} != {"float32"}:
        raise ValueError(f"cos and sin are {cos.dtype} and {sin.dtype}: they must be float32.")
    if not keys or len(keys) != layers or len(values) != layers or key_norms.shape != (layers, h):
        raise ValueError(
            f"kv {kv.shape} has {layers} layers; here are {len(keys)} rings of keys, {len(values)} "
            f"of values, and key_norms {key_norms.shape}, which must be [{layers}, {h}]."
        )
    sizes = {x.shape for x in keys} | {x.shape for x in values}
    if {x.shape for x in keys} != {(b, k, s, h)} or {x.shape for x in values} != {(b, k, s, v)}:
        raise ValueError(
            f"rings {sorted(sizes)} must all be [{b}, {k}, s, h] and [{b}, {k}, s, v], h + v = "
            f"{width}, with one s: write those of other sizes apart."
        )
    if cos.shape != sin.shape or cos.shape[:2] != (b, t) or not 1 <= cos.shape[2] <= h // 2:
        raise ValueError(
            f"cos {cos.shape} and sin {sin.shape} must be [{b}, {t}, r], r at most {h // 2}."
        )
    if start.shape != (b,) or live.shape != (b,) or t > s:
        raise ValueError(
            f"start {start.shape} and live {live.shape} must be [{b}], and {t} rows fit {s}."
        )


def refusal(
    shape: Callable, arrays: dict, instead: str, most_tokens: int | None = None
) -> Exception | None:
    """Why "mosaic_gpu" cannot run.

    Args:
      shape: makes the call's shapes, which say why they are a misfit; only called where kernels can
        be imported.
      arrays: what must be bfloat16; the first is [b, t, ...].
      instead: the implementation that takes what the kernel does not.
      most_tokens: the greatest t, if there is one.
    """
    kinds, t = [str(x.dtype) for x in arrays.values()], next(iter(arrays.values())).shape[1]
    way_out = f"use implementation={instead!r}."
    if set(kinds) != {"bfloat16"}:
        return ValueError(
            f"implementation='mosaic_gpu' takes bfloat16; {', '.join(arrays)} are {kinds}: cast "
            f"them, or {way_out}"
        )
    if most_tokens is not None and t > most_tokens:
        return ValueError(
            f"implementation='mosaic_gpu' takes blocks of at most {most_tokens} tokens; this has "
            f"{t}: {way_out}"
        )
    if (absence := kernel_absence()) is not None:
        return absence
    if (why := shape().misfit()) is None:
        return None
    return ValueError(f"implementation='mosaic_gpu' cannot take {why}: {way_out}")
