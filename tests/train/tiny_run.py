"""A training run that takes seconds: a tiny recipe, its data, and the states that it leaves."""

import dataclasses
import pathlib

import numpy as np

from mimo_jax.sharding import make_mesh
from mimo_jax.train.config import from_dict
from mimo_jax.train.placing import Placing
from mimo_jax.train.run import compute_dtype, open_run
from mimo_jax.train.steps import named_leaves
from mimo_jax.train.tasks import drafter_task, target_task
from tests.tiny_checkpoint import write_tokenizer

VOCABULARY = 300
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "swa_num_key_value_heads": 2,
    "head_dim": 12,
    "v_head_dim": 10,
    "swa_head_dim": 8,
    "swa_v_head_dim": 6,
    "hybrid_layer_pattern": [0, 1],
    "moe_layer_freq": [0, 1],
    "intermediate_size": 40,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1e4,
    "swa_rope_theta": 1e3,
    "sliding_window": 5,
    "max_position_embeddings": 64,
    "expert_format": "dense",
}
DRAFTER = {"block_size": 4, "sliding_window": 6, "num_hidden_layers": 1, "head_dim": 8}


def write_data(folder: pathlib.Path, rng: np.random.Generator, tokens: int = 4000) -> dict:
    """A tokenizer and token files in which much repeats; returns the section [data]."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "vocabulary.json", VOCABULARY)
    words = rng.integers(4, VOCABULARY, (7, 5))
    for name, size in (("train", tokens), ("heldout", 400)):
        ids = words[rng.integers(0, 7, size // 5)].reshape(-1)
        np.save(folder / f"{name}.npy", ids.astype(np.int32))
    return {
        "files": [str(folder / "train.npy")],
        "tokenizer": str(folder / "vocabulary.json"),
        "length": 19,
    }


def make_config(data: dict, out: pathlib.Path, **sections):
    """The tiny recipe; sections given are laid over its own."""
    values = {
        "model": {"shape": SHAPE},
        "data": data,
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "run": {"out": str(out), "steps": 20, "batch": 8, "devices": 1, "peak_tflops": 1.0},
        "drafter": {"shape": DRAFTER, "anchors": 300},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    return from_dict(values)


def make_task(config, kind: str = "target"):
    """The task of a configuration and its placing, as `train` makes them."""
    out = open_run(config, kind)
    section = config.run
    placing = Placing(make_mesh(section.devices), section.batch, section.accumulate)
    build = drafter_task if kind == "drafter" else target_task
    return build(config, out, placing, compute_dtype(section.dtype), kind), placing


def bits(state) -> dict[str, np.ndarray]:
    """All of a state's arrays on the host."""
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state).items()}


def assert_same_bits(state, other) -> None:
    """Fails unless both states have the same arrays, bit for bit."""
    mine, theirs = bits(state), bits(other)
    assert mine.keys() == theirs.keys() and mine
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype, name
        assert value.tobytes() == theirs[name].tobytes(), name


def changed(config, **run):
    """The configuration with other fields in [run]."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **run))
