"""MiMo's forward pass and its DFlash drafter's in plain numpy float64: slow, independent of ours.

Weights are dicts of arrays under the names of a released checkpoint with split q, k and v, stored
[out, in]; configurations are dicts with the names of config.json. One sequence, no cache, no batch.
`mistake=` plants one of `MISTAKES`, so that tests can show that a comparison would catch it.
"""

import numpy as np

MISTAKES = (
    "value scale forgotten",
    "sink scaled",
    "rope on the wrong half",
    "feature of the wrong layer",
    "window one too wide",
    "biased routing weights",
)
DRAFTER_MISTAKES = (*MISTAKES, "block seen the other way")
SLIDING = 1


def rms_norm(x, weight, eps):
    """Divides by the root mean square of the last axis, then multiplies by the weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    """x times its sigmoid."""
    return x * sigmoid(x)


def sigmoid(x):
    """The logistic function, without overflow on either side."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def rope(x, positions, rotary_dim, theta, mistake=None):
    """Rotates the first rotary_dim dimensions of x [t, heads, dim], pairing i with i + half."""
    if mistake == "rope on the wrong half":
        # The last dimensions turn instead: bring them to the front, and back afterwards.
        turned = rope(np.roll(x, rotary_dim, axis=-1), positions, rotary_dim, theta)
        return np.roll(turned, -rotary_dim, axis=-1)
    half = rotary_dim // 2
    angle = positions[:, None] * theta ** (-2.0 * np.arange(half) / rotary_dim)
    cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
    first, second, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attend(q, k, v, visible, sink=None, mistake=None):
    """Softmax attention, one query head after the other.

    Args:
      q: [t, heads, head_dim], rotated.
      k: [s, kv_heads, head_dim], rotated.
      v: [s, kv_heads, v_head_dim].
      visible: bool [t, s].
      sink: one logit a query head, which takes mass and gives no value, or None.
      mistake: as in `MISTAKES`.

    Returns:
      [t, heads * v_head_dim].
    """
    heads, dim = q.shape[1:]
    outputs = []
    for head in range(heads):
        kv = head // (heads // k.shape[1])
        scores = np.where(visible, q[:, head] @ k[:, kv].T * dim**-0.5, -np.inf)
        top = scores.max(axis=-1, keepdims=True)
        if sink is None:
            p = np.exp(scores - top)
            total = p.sum(axis=-1, keepdims=True)
        else:
            logit = sink[head] * (dim**-0.5 if mistake == "sink scaled" else 1.0)
            top = np.maximum(top, logit)
            p = np.exp(scores - top)
            total = p.sum(axis=-1, keepdims=True) + np.exp(logit - top)
        outputs.append(p / total @ v[:, kv])
    return np.concatenate(outputs, axis=-1)


def attention_shape(config, layer):
    """Heads, kv heads, sizes, theta, sink and window's kind of one target layer."""
    swa = config["hybrid_layer_pattern"][layer] == SLIDING
    head_dim = config["swa_head_dim" if swa else "head_dim"]
    return {
        "sliding": swa,
        "heads": config["num_attention_heads"],
        "kv_heads": config["swa_num_key_value_heads" if swa else "num_key_value_heads"],
        "head_dim": head_dim,
        "v_head_dim": config["swa_v_head_dim" if swa else "v_head_dim"],
        "rotary_dim": int(head_dim * config["partial_rotary_factor"]),
        "theta": config["swa_rope_theta" if swa else "rope_theta"],
        "sink": config[f"add_{'swa' if swa else 'full'}_attention_sink_bias"],
    }


def target_attention(w, config, layer, x, window, mistake):
    """Causal self-attention of one layer on x [t, d], normed."""
    shape = attention_shape(config, layer)
    length = len(x)
    at = np.arange(length)
    q = (x @ w["q_proj.weight"].T).reshape(length, shape["heads"], shape["head_dim"])
    k = (x @ w["k_proj.weight"].T).reshape(length, shape["kv_heads"], shape["head_dim"])
    v = (x @ w["v_proj.weight"].T).reshape(length, shape["kv_heads"], shape["v_head_dim"])
    scale = config.get("attention_value_scale")
    if scale is not None and mistake != "value scale forgotten":
        v = v * scale
    q = rope(q, at, shape["rotary_dim"], shape["theta"], mistake)
    k = rope(k, at, shape["rotary_dim"], shape["theta"], mistake)
    visible = at[None, :] <= at[:, None]
    if shape["sliding"]:
        visible &= at[None, :] > at[:, None] - window
    sink = w["attention_sink_bias"] if shape["sink"] else None
    return attend(q, k, v, visible, sink, mistake) @ w["o_proj.weight"].T


def swiglu(w, x):
    """down(silu(gate x) * (up x)); nothing is clamped."""
    hidden = silu(x @ w["gate_proj.weight"].T) * (x @ w["up_proj.weight"].T)
    return hidden @ w["down_proj.weight"].T


def route(w, config, x, mistake=None):
    """Chosen experts [t, k] and their weights: sigmoid scores, chosen with the bias added."""
    scores = sigmoid(x @ w["gate.weight"].T)
    biased = scores + w["gate.e_score_correction_bias"]
    # A stable sort of the negated scores: of equal ones the lowest index comes first.
    chosen = np.argsort(-biased, axis=-1, kind="stable")[:, : config["num_experts_per_tok"]]
    source = biased if mistake == "biased routing weights" else scores
    weights = np.take_along_axis(source, chosen, axis=-1)
    if config.get("norm_topk_prob", True):
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return chosen, weights * (config.get("routed_scaling_factor") or 1.0)


def routing_margin(w, config, x):
    """The smallest difference that decided a choice of experts; within rounding it means little."""
    biased = sigmoid(x @ w["gate.weight"].T) + w["gate.e_score_correction_bias"]
    ranked = np.sort(biased, axis=-1)
    last = ranked.shape[-1] - config["num_experts_per_tok"]
    return np.min(ranked[:, last] - ranked[:, last - 1]) if last else np.inf


def experts_ffn(w, config, x, mistake=None):
    """Each token through its chosen experts, token by token."""
    chosen, weights = route(w, config, x, mistake)
    out = np.zeros_like(x)
    for t in range(len(x)):
        for expert, weight in zip(chosen[t], weights[t], strict=True):
            out[t] += weight * swiglu(under(w, f"experts.{expert}."), x[t])
    return out


def under(w, prefix):
    """The entries of w whose names begin with prefix, without it."""
    return {name[len(prefix) :]: a for name, a in w.items() if name.startswith(prefix)}


def target_forward(weights, config, tokens, window=None, mistake=None, margins=None):
    """The whole target on one sequence.

    Args:
      weights: `model.*` and `lm_head.weight`, any floating dtype.
      config: names of config.json.
      tokens: ids [t].
      window: keys that a sliding layer's query sees, itself included; config's sliding_window.
      mistake: as in `MISTAKES`.
      margins: a list to which each expert layer's `routing_margin` is added.

    Returns:
      logits [t, vocabulary], and the residual stream after each layer [layers, t, d].
    """
    w = {name: np.asarray(a, np.float64) for name, a in weights.items()}
    window = config["sliding_window"] if window is None else window
    window += mistake == "window one too wide"
    eps = config["layernorm_epsilon"]
    h = w["model.embed_tokens.weight"][np.asarray(tokens)]
    residuals = []
    for layer in range(config["num_hidden_layers"]):
        lw = under(w, f"model.layers.{layer}.")
        x = rms_norm(h, lw["input_layernorm.weight"], eps)
        h = h + target_attention(under(lw, "self_attn."), config, layer, x, window, mistake)
        x = rms_norm(h, lw["post_attention_layernorm.weight"], eps)
        mlp = under(lw, "mlp.")
        moe = config["moe_layer_freq"][layer]
        if moe and margins is not None:
            margins.append(routing_margin(mlp, config, x))
        h = h + (experts_ffn(mlp, config, x, mistake) if moe else swiglu(mlp, x))
        residuals.append(h)
    logits = rms_norm(h, w["model.norm.weight"], eps) @ w["lm_head.weight"].T
    return logits, np.stack(residuals)


def features(residuals, drafter_config, mistake=None):
    """The tapped residual streams side by side: [t, taps * d]."""
    ids = list(drafter_config["target_layer_ids"])
    if mistake == "feature of the wrong layer":
        ids[0] += 1
    return np.concatenate([residuals[i] for i in ids], axis=-1)


def drafter_layer(config, layer):
    """A drafter layer's window, None for full attention, and whether its block is causal."""
    kinds = config.get("layer_types")
    window = config.get("sliding_window")
    if kinds and kinds[layer] == "full_attention":
        window = None
    causal = config.get("is_causal")
    if causal is None:
        causal = bool(kinds) and window is not None
    return window, causal


def drafter_attention(w, config, layer, x, context, start, mistake):
    """Attention of the block x [B, d], normed, over context features [s, d] and itself."""
    heads, kv, dim = (config[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    rotary, theta = int(dim * config.get("partial_rotary_factor", 1.0)), config["rope_theta"]
    block, length = len(x), len(context)
    q_at = start + np.arange(block)
    k_at = np.concatenate([np.arange(length), q_at])
    source = np.concatenate([context, x])
    q = (x @ w["q_proj.weight"].T).reshape(block, heads, dim)
    k = (source @ w["k_proj.weight"].T).reshape(length + block, kv, dim)
    v = (source @ w["v_proj.weight"].T).reshape(length + block, kv, -1)
    q = rms_norm(q, w["q_norm.weight"], config["rms_norm_eps"])
    k = rms_norm(k, w["k_norm.weight"], config["rms_norm_eps"])
    scale = config.get("attention_value_scale")
    if scale is not None and mistake != "value scale forgotten":
        v = v * scale
    q = rope(q, q_at, rotary, theta, mistake)
    k = rope(k, k_at, rotary, theta, mistake)
    window, causal = drafter_layer(config, layer)
    in_block = np.arange(length + block) >= length
    visible = np.broadcast_to((k_at < start) | in_block, (block, length + block))
    if window is not None:
        window += mistake == "window one too wide"
        visible = visible & (np.abs(q_at[:, None] - k_at[None, :]) < window)
    if causal != (mistake == "block seen the other way"):
        visible = visible & (~in_block | (k_at[None, :] <= q_at[:, None]))
    sinks = config.get("add_swa_attention_sink_bias") and window is not None
    sink = w["attention_sink_bias"] if sinks else None
    return attend(q, k, v, visible, sink, mistake) @ w["o_proj.weight"].T


def drafter_forward(weights, config, target_weights, tapped, anchor, start, mistake=None):
    """One block of the drafter.

    Args:
      weights: `fc.weight`, `layers.N.*`, ..., and `mask_embedding` [d].
      config: names of the drafter's config.json.
      target_weights: for the shared embedding and head.
      tapped: features of positions 0 to s - 1 [s, taps * d]; those from `start` on are not seen.
      anchor: id of the newest token, whose position is `start`.
      start: the anchor's position.
      mistake: as in `MISTAKES`.

    Returns:
      logits [B, vocabulary]; row j is for the token at start + j (row 0 is discarded by users), and
      the hidden rows [B, d] after the final norm.
    """
    w = {name: np.asarray(a, np.float64) for name, a in weights.items()}
    eps = config["rms_norm_eps"]
    embedding = np.asarray(target_weights["model.embed_tokens.weight"], np.float64)
    head = np.asarray(target_weights["lm_head.weight"], np.float64)
    context = rms_norm(tapped @ w["fc.weight"].T, w["hidden_norm.weight"], eps)
    masks = config["block_size"] - 1
    h = np.stack([embedding[anchor]] + [w["mask_embedding"]] * masks)
    for layer in range(config["num_hidden_layers"]):
        lw = under(w, f"layers.{layer}.")
        x = rms_norm(h, lw["input_layernorm.weight"], eps)
        own = under(lw, "self_attn.")
        h = h + drafter_attention(own, config, layer, x, context, start, mistake)
        x = rms_norm(h, lw["post_attention_layernorm.weight"], eps)
        h = h + swiglu(under(lw, "mlp."), x)
    h = rms_norm(h, w["norm.weight"], eps)
    return h @ head.T, h
