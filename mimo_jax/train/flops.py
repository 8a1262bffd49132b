"""Floating-point operations of training, counted from the shapes: products alone."""

from mimo_jax.config import AttentionConfig, ModelConfig
from mimo_jax.drafter_config import DrafterConfig


def forward_flops(config: ModelConfig, length: int, head: bool = True) -> float:
    """Operations of the target's forward pass, a token of a row of that length on the mean.

    Experts count as far as they are active; a product of [m, k] and [k, n] is 2 m k n.

    Args:
      config: of the target.
      length: tokens of a row.
      head: whether logits are made of every token.
    """
    d, total = config.hidden_size, 0.0
    for layer in range(config.num_hidden_layers):
        total += _attention(config.attention(layer), length)
        if config.moe_layer_freq[layer]:
            width = config.num_experts_per_tok * config.moe_intermediate_size
            total += 2 * d * (3 * width + config.n_routed_experts)
        else:
            total += 2 * d * 3 * config.intermediate_size
    return total + (2 * d * config.vocab_size if head else 0)


def _attention(attention: AttentionConfig, length: int) -> float:
    d, n, k = attention.hidden_size, attention.num_heads, attention.num_kv_heads
    h, v = attention.head_dim, attention.v_head_dim
    projections = d * (n * h + k * (h + v) + n * v)
    seen = (length + 1) / 2
    if attention.window is not None and attention.window < length:
        seen = attention.window - attention.window * (attention.window - 1) / (2 * length)
    return 2 * (projections + n * (h + v) * seen)


def target_flops(config: ModelConfig, rows: int, length: int) -> float:
    """Operations of a training step of the target: the backward pass counts twice the forward."""
    return 3 * forward_flops(config, length) * rows * length


def drafter_flops(
    config: DrafterConfig, target: ModelConfig, rows: int, length: int, anchors: int
) -> float:
    """Operations of a training step of the drafter.

    Args:
      config: of the drafter.
      target: of the target, whose forward pass counts once, without logits of every token.
      rows: of a step.
      length: tokens of a row.
      anchors: blocks of a row.
    """
    a, d, block = config.attention, config.hidden_size, config.block_size
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * 2 * a.head_dim
    context = len(config.target_layer_ids) * d * d + config.num_hidden_layers * d * keys
    # In the mean half a row is before an anchor, of which a window is all that a layer sees.
    windows = [config.attention_of(i).window for i in range(config.num_hidden_layers)]
    seen = sum((length // 2 if w is None else min(w, length // 2)) + block for w in windows)
    layer = d * (2 * queries + keys + 3 * config.intermediate_size)
    row = config.num_hidden_layers * layer + 2 * queries * seen
    logits = (block - 1) * d * config.vocab_size
    features = forward_flops(target, length, head=False) * length
    # Of the logits, the target's are made forwards alone: one part of four.
    return rows * (features + 6 * context * length + anchors * (6 * block * row + 8 * logits))
