"""Drafters that come by themselves: z-lab's layout and its variants, against the oracle."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.mimo_numpy import DRAFTER_MISTAKES, drafter_forward
from oracles.random_weights import random_drafter
from tiny_checkpoint import CONFIG, checkpoint  # noqa: F401
from tolerances import assert_close, relative_norm
from xiaomi_writer import write_safetensors

import mimo_jax
from mimo_jax.checkpoint import zlab
from mimo_jax.decode.program import make_plan
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.errors import MimoError
from mimo_jax.model.mimo import head_logits
from mimo_jax.sharding import Parallel, make_mesh

FULL, SLIDING = "full_attention", "sliding_attention"
BASE = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 18,
    "intermediate_size": 136,
    "vocab_size": 312,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "num_target_layers": 3,
    "max_window_layers": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
INNER = {"mask_token_id": 7, "target_layer_ids": [0, 2]}
VARIANTS = {
    # z-lab's first: full attention, everything in its place.
    "full": BASE
    | {"layer_types": [FULL] * 2, "rope_theta": 1000000, "block_size": 5, "dflash_config": INNER}
    | {"use_sliding_window": False, "sliding_window": None, "rope_scaling": None},
    # Later: mixed layers, causal where they slide; a prefix, fused projections.
    "mixed": BASE
    | {"layer_types": [SLIDING, FULL], "sliding_window": 11, "use_sliding_window": True}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000000}}
    | {"dflash_config": INNER | {"block_size": 5}},
    # An "assistant": an encoder's names, all beside each other, no direction in the block.
    "assistant": BASE
    | {"layer_types": [SLIDING] * 2, "sliding_window": 11, "is_causal": False, "block_size": 5}
    | {"rope_theta": 500000}
    | INNER,
}


def oracle_config(fields: dict) -> dict:
    """One flat dictionary, as the oracle reads it."""
    flat = {k: v for k, v in fields.items() if k not in ("dflash_config", "rope_parameters")}
    rope = {"rope_theta": fields.get("rope_parameters", fields)["rope_theta"]}
    return flat | fields.get("dflash_config", {}) | rope


def draw(name: str, rng) -> tuple[dict, dict[str, np.ndarray]]:
    """A variant's configuration for the oracle, and random weights under plain names."""
    config = oracle_config(VARIANTS[name])
    seeded = np.random.RandomState(rng.integers(2**32))
    return config, random_drafter(config | {"add_swa_attention_sink_bias": False}, seeded)


def write(folder, name: str, weights: dict[str, np.ndarray]):
    """Stores a drafter as its variant does."""
    stored = {key: value for key, value in weights.items() if key != "mask_embedding"}
    if name == "mixed":
        for layer in range(2):
            prefix = f"layers.{layer}.self_attn."
            parts = [stored.pop(f"{prefix}{letter}_proj.weight") for letter in "qkv"]
            stored[f"{prefix}qkv_proj.weight"] = np.concatenate(parts)
        stored = {f"model.{key}": value for key, value in stored.items()}
    if name == "assistant":
        stored["encoder.fc.weight"] = stored.pop("fc.weight")
        stored["encoder.output_norm_enc.weight"] = stored.pop("hidden_norm.weight")
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", stored)
    (folder / "config.json").write_text(json.dumps(VARIANTS[name]))
    return folder


def drafted(drafter, config, embedding, head, taps, starts, rng):
    """Logits [b, block, w] from contexts that hold `taps`, and rejected rows after each start."""
    graph, state = nnx.split(drafter)
    shape, block = {"batch": len(starts), "max_len": len(taps)}, config.block_size
    contexts = drafter.init_contexts(config, **shape, block=block, shards=1, dtype=jnp.float32)
    rows = np.broadcast_to(taps, (len(starts), *taps.shape)).astype(np.float32)
    rejected = rng.standard_normal((len(starts), block, taps.shape[1])).astype(np.float32)
    anchors = rng.integers(0, len(embedding), len(starts))

    @jax.jit
    def run(state, rows, rejected, starts, embedded, contexts):
        drafter = nnx.merge(graph, state)
        live = jnp.arange(rows.shape[1]) < starts[:, None]
        contexts = drafter.ingest(rows, jnp.zeros_like(starts), live, contexts, Parallel())
        every = jnp.ones(rejected.shape[:2], bool)
        contexts = drafter.ingest(rejected, starts, every, contexts, Parallel())
        places = tuple(context.positions(starts) for context in contexts)
        return drafter(drafter.block(embedded, block), starts, contexts, places)

    hidden = run(state, rows, rejected, starts, jnp.asarray(embedding[anchors]), contexts)
    return anchors, np.asarray(head_logits(hidden, jnp.asarray(head)))


def load(folder, embedding, devices=1):
    """The drafter's module, loaded onto a mesh, and its configuration."""
    stored = zlab.open_drafter(folder, CONFIG)
    plan = make_plan(CONFIG, stored.config, make_mesh(devices), dtype=jnp.float32)
    state = zlab.load(stored, plan.params[1], plan.param_shardings[1], jnp.asarray(embedding))
    return nnx.merge(plan.graphs[1], state), stored.config


@pytest.mark.parametrize("name", VARIANTS)
def test_a_drafter_equals_the_oracle(name, rng, tmp_path):
    config, weights = draw(name, rng)
    embedding, head = (rng.standard_normal((312, 96)).astype(np.float32) for _ in range(2))
    drafter, read = load(write(tmp_path / name, name, weights), embedding)
    window = read.sliding_window
    assert window == (None if name == "full" else 11)
    starts = np.array([1, 9, 30], np.int32)
    taps = rng.standard_normal((31, 2 * 96))
    anchors, got = drafted(drafter, read, embedding, head, taps, starts, rng)
    # The mask's embedding is the target's own row, not what the drafter's writer drew.
    source = weights | {"mask_embedding": embedding[7]}
    target = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}

    def oracle(mistake=None):
        return np.stack(
            [
                drafter_forward(source, config, target, taps, anchor, int(start), mistake)[0]
                for anchor, start in zip(anchors, starts, strict=True)
            ]
        )

    assert_close(got, oracle(), "float32")
    caught = {"rope on the wrong half": False, "window one too wide": window is not None}
    for mistake in ("window one too wide", "block seen the other way"):
        assert mistake in DRAFTER_MISTAKES
        if caught.get(mistake, True):
            assert relative_norm(got, oracle(mistake)) > 1e-4, mistake


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_the_stored_ones_on_a_mesh(name, rng, tmp_path):
    _, weights = draw(name, rng)
    embedding = rng.standard_normal((312, 96)).astype(np.float32)
    drafter, _ = load(write(tmp_path / name, name, weights), embedding, devices=4)
    layer = drafter.layers[1]
    source = {k.removeprefix("layers.1."): v for k, v in weights.items()}
    assert (np.asarray(layer.attention.query[...]) == source["self_attn.q_proj.weight"]).all()
    kv = np.asarray(layer.attention.kv[...])
    keys, values = (
        np.repeat(source[f"self_attn.{letter}_proj.weight"].reshape(2, 18, 96), 2, axis=0)
        for letter in "kv"
    )
    assert (kv == np.concatenate([keys, values], axis=1)).all()
    assert (np.asarray(layer.mlp.gate_up[...])[1] == source["mlp.up_proj.weight"]).all()
    assert (np.asarray(drafter.features[...]) == weights["fc.weight"]).all()
    assert (np.asarray(drafter.mask_embedding[...]) == embedding[7]).all()


def answers(checkpoint, drafter, prompt, **options):  # noqa: F811
    options = {"max_tokens": 40, "ignore_eos": True} | options
    with mimo_jax.load(checkpoint, devices=1, drafter=drafter, progress=False) as engine:
        drafting = engine.generate(prompt, **options)
        return drafting, engine.generate(prompt, **options, speculative=False)


def test_an_engine_answers_the_same_with_such_a_drafter(checkpoint, rng, tmp_path):  # noqa: F811
    _, weights = draw("mixed", rng)
    folder = write(tmp_path / "mixed", "mixed", weights)
    drafting, plain = answers(
        checkpoint, folder, "abx", temperature=1.0, seed=int(rng.integers(99))
    )
    assert drafting.tokens == plain.tokens and len(plain.tokens) == 40
    assert sum(plain.stats.acceptance_histogram) == 40
    assert len(drafting.stats.acceptance_histogram) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "assistant"])
def test_other_variants_answer_the_same(name, checkpoint, rng, tmp_path):  # noqa: F811
    _, weights = draw(name, rng)
    drafting, plain = answers(checkpoint, str(write(tmp_path / name, name, weights)), "hgx klm")
    assert drafting.tokens == plain.tokens


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "YaRN"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "YaRN"),
        ({"rope_is_neox_style": False}, "interleaved RoPE"),
        ({"architectures": ["DFlash2DraftModel"]}, "DFlash2DraftModel"),
        ({"architectures": ["Qwen3DSparkModel"]}, "Qwen3DSparkModel"),
        ({"dflash_config": INNER | {"conv_kernel_size": 2}}, "DFlash2's convolutions"),
        ({"dflash_config": INNER | {"selector_rank": 256}}, "candidate selector"),
        ({"runtime_block_size": 7}, "DSpark"),
        ({"transformer_layer_config": {}}, "speculators"),
        ({"aux_hidden_state_layer_ids": [1, 3]}, "speculators"),
        ({"draft_vocab_size": 32000}, "t2d"),
        ({"sample_from_anchor": True}, "anchor's row"),
        ({"dflash_config": INNER | {"output_multiplier": 0.196}}, "scaled"),
        ({"dflash_config": INNER | {"rope_scaling": "yarn"}}, "rope_scaling='yarn'"),
        ({"layer_types": [FULL, SLIDING]}, "sliding_window"),
        ({"layer_types": [SLIDING] * 2, "sliding_window": 11}, "use_sliding_window"),
        ({"attention_gate": True}, "attention_gate"),
        ({"dflash_config": INNER | {"mask_token_id": 312}}, "mask_token_id=312"),
        ({"hidden_size": 64}, "hidden_size=64"),
    ],
)
def test_configurations_that_are_not_supported(changes, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["full"] | changes))
    with pytest.raises(MimoError, match=words):
        zlab.open_drafter(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("t2d", "vocabulary of its own"),
        ("lm_head.weight", "head of its own"),
        ("layers.0.attention_conv.base_kernel", "DFlash2's convolutions"),
        ("candidate_selector.hidden_projection.weight", "DFlash2's candidate selector"),
        ("markov_head.w1.weight", "DSpark's heads"),
        ("layers.1.self_attn.g_proj.weight", "gated attention"),
        ("layers.1.self_attn.q_proj.bias", "biases"),
        ("model.norm.weight", "are both norm.weight"),
        ("layers.2.input_layernorm.weight", "not known: 1 .layers.2"),
        (None, "missing: .*layers.1.mlp.down_proj.weight"),
    ],
)
def test_tensors_that_are_not_supported(name, words, rng, tmp_path):
    _, weights = draw("full", rng)
    if name is None:
        del weights["layers.1.mlp.down_proj.weight"]
    else:
        weights[name] = np.ones(3, np.float32)
    folder = write(tmp_path / "full", "full", weights)
    with pytest.raises(MimoError, match=words):
        zlab.open_drafter(folder, CONFIG)


def test_configurations_come_back_as_they_were():
    for fields in VARIANTS.values():
        config = DrafterConfig.from_dict(fields)
        again = DrafterConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
    mixed = DrafterConfig.from_dict(VARIANTS["mixed"])
    assert mixed.causal_layers == (0,) and mixed.attention_of(0).window == 11
    assert mixed.attention_of(1).window is None and mixed.rope_theta == 1e7
    # A word of ours is not overridden by the rule for files without one.
    both = dataclasses.replace(mixed, causal_layers=())
    assert DrafterConfig.from_dict(both.to_dict()) == both


def test_a_directory_without_a_drafter_is_named(checkpoint, tmp_path):  # noqa: F811
    with pytest.raises(MimoError, match="give a drafter's directory"):
        mimo_jax.load(checkpoint, devices=1, drafter=tmp_path, progress=False)
