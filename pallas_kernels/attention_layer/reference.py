"""A window layer's attention, plain: the references of its three parts, one after another."""

from pallas_kernels.attention.reference import block_attention_reference
from pallas_kernels.linear.reference import linear_reference


def attention_layer_reference(
    h, norm, qkv, qkv_scale, cos, sin, keys, values, start, live, sink, output, output_scale,
    *, window, value_scale, epsilon, stream=False,
):  # fmt: skip
    """See `api.attention_layer`."""
    (b, t, d), groups = h.shape, keys.shape[1]
    rows = h.reshape(b * t, d)
    product = linear_reference(rows, qkv, qkv_scale, norm, epsilon, out_dtype=h.dtype)
    heads, keys, values = block_attention_reference(
        product.reshape(b, t, groups, -1),
        *(cos, sin, keys, values, start, live, sink),
        window=window,
        value_scale=value_scale,
    )
    flat = heads.astype(h.dtype).reshape(b * t, -1)
    added = rows if stream else None
    y = linear_reference(flat, output, output_scale, residual=added, out_dtype=h.dtype)
    return y.reshape(h.shape), keys, values
