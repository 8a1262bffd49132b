"""MiMo's multi-token-prediction layers in plain numpy float64: whole sequences, no cache, no ring.

Weights are dicts under the names of a released checkpoint with split q, k and v; configurations are
dicts with the names of config.json. `mistake=` plants one of `MISTAKES`.
"""

import numpy as np
from oracles.mimo_numpy import attend, rms_norm, rope, swiglu, under

MISTAKES = (
    "hidden half first",
    "layers chained",
    "one cache for all layers",
    "queries turned to the token's position",
    "window one too wide",
    "window one too narrow",
    "hidden state of the other kind",
    "norms of token and hidden swapped",
    "value scale forgotten",
    "sink forgotten",
    "token of the row itself",
)


def sliding_shape(config):
    """Sizes of a sliding layer's attention, which is also that of every MTP layer."""
    return {
        "heads": config["num_attention_heads"],
        "kv_heads": config["swa_num_key_value_heads"],
        "head_dim": config["swa_head_dim"],
        "v_head_dim": config["swa_v_head_dim"],
        "rotary_dim": int(config["swa_head_dim"] * config["partial_rotary_factor"]),
        "theta": config["swa_rope_theta"],
        "sink": config["add_swa_attention_sink_bias"],
    }


def draft_input(w, config, tokens, hidden, mistake=None):
    """eh_proj of each row's normed token and hidden state: [t, d]."""
    eps = config["layernorm_epsilon"]
    norms = ["enorm.weight", "hnorm.weight"]
    if mistake == "norms of token and hidden swapped":
        norms.reverse()
    halves = [rms_norm(tokens, w[norms[0]], eps), rms_norm(hidden, w[norms[1]], eps)]
    if mistake == "hidden half first":
        halves.reverse()
    return np.concatenate(halves, axis=-1) @ w["eh_proj.weight"].T


def keys_values(w, config, u, at, mistake=None):
    """Rotated keys [t, kv, h] and scaled values [t, kv, v] of rows u at their positions."""
    shape = sliding_shape(config)
    x = rms_norm(u, w["input_layernorm.weight"], config["layernorm_epsilon"])
    k = (x @ w["self_attn.k_proj.weight"].T).reshape(len(u), shape["kv_heads"], -1)
    v = (x @ w["self_attn.v_proj.weight"].T).reshape(len(u), shape["kv_heads"], -1)
    if mistake != "value scale forgotten":
        v = v * (config.get("attention_value_scale") or 1.0)
    return rope(k, at, shape["rotary_dim"], shape["theta"]), v


def layer_forward(w, config, tokens, hidden, window, layer, mistake=None, cached=None):
    """One MTP layer on rows 0 to t - 1.

    Args:
      w: the layer's weights.
      config: names of the target's config.json.
      tokens: embeddings [t, d]; row j's is that of the token at j + layer + 1.
      hidden: the target's hidden states [t, d].
      window: keys that a row sees, itself included.
      layer: from 0; only mistakes look at it.
      mistake: as in `MISTAKES`.
      cached: keys and values to see instead of the layer's own.

    Returns:
      residual stream [t, d], rows after the final norm [t, d], and the keys and values.
    """
    shape, eps = sliding_shape(config), config["layernorm_epsilon"]
    u = draft_input(w, config, tokens, hidden, mistake)
    row = np.arange(len(u))
    # Turning queries and keys by the same amount would change nothing: RoPE is relative.
    ahead = layer + 1 if mistake == "queries turned to the token's position" else 0
    x = rms_norm(u, w["input_layernorm.weight"], eps)
    q = (x @ w["self_attn.q_proj.weight"].T).reshape(len(u), shape["heads"], -1)
    q = rope(q, row + ahead, shape["rotary_dim"], shape["theta"])
    own = keys_values(w, config, u, row, mistake)
    k, v = own if cached is None else cached
    window += (mistake == "window one too wide") - (mistake == "window one too narrow")
    visible = (row[None, :] <= row[:, None]) & (row[None, :] > row[:, None] - window)
    sink = w["self_attn.attention_sink_bias"]
    sink = sink if shape["sink"] and mistake != "sink forgotten" else None
    u = u + attend(q, k, v, visible, sink) @ w["self_attn.o_proj.weight"].T
    u = u + swiglu(under(w, "mlp."), rms_norm(u, w["pre_mlp_layernorm.weight"], eps))
    return u, rms_norm(u, w["final_layernorm.weight"], eps), own


def states(config, target_weights, residual, normed, mistake=None):
    """The target's hidden states as the layers take them: before its final norm, or after."""
    hidden = np.asarray(residual, np.float64)
    if normed == (mistake == "hidden state of the other kind"):
        return hidden
    weight = np.asarray(target_weights["model.norm.weight"], np.float64)
    return rms_norm(hidden, weight, config["layernorm_epsilon"])


def layer_weights(weights, layer):
    """One layer's weights in float64."""
    return {n: np.asarray(a, np.float64) for n, a in under(weights, f"layers.{layer}.").items()}


def count_layers(weights):
    """How many layers the weights are of."""
    return 1 + max(int(name.split(".")[1]) for name in weights)


def mtp_logits(weights, config, target_weights, residual, tokens, normed, mistake=None):
    """Every layer's logits at every row whose token exists.

    Args:
      weights: `model.mtp.layers.K.*` without `model.mtp.`.
      config: names of the target's config.json.
      target_weights: for the shared embedding and head, and the final norm.
      residual: the target's last residual stream [t, d], before the final norm.
      tokens: ids [t].
      normed: whether the layers take the hidden state after the target's final norm.
      mistake: as in `MISTAKES`.

    Returns:
      a list: for layer k [t - k - 1, vocabulary], row j for the token at j + k + 2.
    """
    hidden = states(config, target_weights, residual, normed, mistake)
    embedded = np.asarray(target_weights["model.embed_tokens.weight"], np.float64)[tokens]
    head = np.asarray(target_weights["lm_head.weight"], np.float64)
    out, shared = [], None
    for layer in range(count_layers(weights)):
        rows = len(tokens) - layer - 1
        first = layer + (mistake != "token of the row itself")
        w, window = layer_weights(weights, layer), config["sliding_window"]
        cached = None if shared is None else tuple(a[:rows] for a in shared)
        taken = embedded[first : first + rows]
        u, final, own = layer_forward(
            w, config, taken, hidden[:rows], window, layer, mistake, cached
        )
        if mistake == "layers chained":
            hidden = u
        if mistake == "one cache for all layers" and shared is None:
            shared = own
        out.append(final @ head.T)
    return out


def draft(weights, config, target_weights, residual, tokens, normed):
    """The drafts that the layers make after the last of the tokens, and how sure each was.

    After a first token the target has no hidden state yet: it counts as zeros, in a row that sees
    no key.

    Args:
      weights: `model.mtp.layers.K.*` without `model.mtp.`.
      config: names of the target's config.json.
      target_weights: for the shared embedding and head, and the final norm.
      residual: the target's last residual stream of all tokens but the last [t - 1, d].
      tokens: ids [t], the anchor last.
      normed: whether the layers take the hidden state after the target's final norm.

    Returns:
      ids, one of each layer, and the differences between the best logit and the next.
    """
    table = np.asarray(target_weights["model.embed_tokens.weight"], np.float64)
    head = np.asarray(target_weights["lm_head.weight"], np.float64)
    hidden = states(config, target_weights, residual, normed)
    tokens, drafts, margins, rows = list(tokens), [], [], len(hidden)
    for layer in range(count_layers(weights)):
        w = layer_weights(weights, layer)
        taken = table[tokens[layer + 1 : layer + 1 + rows]]
        if rows:
            final = layer_forward(w, config, taken, hidden, config["sliding_window"], layer)[1]
        else:
            final = first_row(w, config, table[tokens[-1:]])
        logits = final[-1] @ head.T
        drafts.append(int(np.argmax(logits)))
        margins.append(float(np.diff(np.sort(logits)[-2:])[0]))
        tokens.append(drafts[-1])
    return drafts, margins


def first_row(w, config, token):
    """The row after the final norm [1, d] where no hidden state and no key exists yet."""
    eps = config["layernorm_epsilon"]
    u = draft_input(w, config, token, np.zeros_like(token))
    u = u + swiglu(under(w, "mlp."), rms_norm(u, w["pre_mlp_layernorm.weight"], eps))
    return rms_norm(u, w["final_layernorm.weight"], eps)
