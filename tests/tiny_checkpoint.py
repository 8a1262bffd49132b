"""A tiny random checkpoint for the tests of store, engine and command: all sizes differ."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from mimo_jax.checkpoint import store
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.model.dflash import Drafter
from mimo_jax.model.mimo import MiMo
from mimo_jax.text.tokenizer import Tokenizer, train_tokenizer

CONFIG = ModelConfig(
    vocab_size=312,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    swa_num_key_value_heads=4,
    head_dim=20,
    v_head_dim=12,
    swa_head_dim=28,
    swa_v_head_dim=24,
    hybrid_layer_pattern=(0, 1, 0),
    moe_layer_freq=(0, 1, 1),
    intermediate_size=160,
    moe_intermediate_size=128,
    n_routed_experts=6,
    num_experts_per_tok=3,
    partial_rotary_factor=0.5,
    rope_theta=1e4,
    swa_rope_theta=1e3,
    sliding_window=13,
    max_position_embeddings=176,
    attention_value_scale=0.707,
    eos_token_ids=(0,),
)
DRAFTER = DrafterConfig(
    vocab_size=312,
    hidden_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=136,
    block_size=5,
    mask_token_id=3,
    target_layer_ids=(0, 1, 2),
    rope_theta=1e4,
    sliding_window=21,
    add_swa_attention_sink_bias=True,
)
FAVOURED = "é世a 🎉"
"""The model mostly emits these characters' bytes: drafts agree at times, and UTF-8 is cut."""


def write_tokenizer(path: pathlib.Path, vocab: int = 300, added: tuple[str, ...] = ()) -> Tokenizer:
    """Trains a small vocabulary on words of letters, adds some tokens, and writes it."""
    words = [f"{a}{b}{c} = {b}{a}" for a in "abcdefgh" for b in "xyzuvw" for c in "klmn"]
    backend = train_tokenizer(iter(words), vocab)
    backend.add_tokens([tokenizers.AddedToken(t, normalized=False) for t in added])
    backend.save(str(path))
    return Tokenizer.from_file(path)


@jax.jit
def _build(key):
    first, second = jax.random.split(key)
    model = MiMo(CONFIG, nnx.Rngs(first), dtype=jnp.float32)
    drafter = Drafter(DRAFTER, nnx.Rngs(second), dtype=jnp.float32)
    return nnx.state(model), nnx.state(drafter)


def random_params(tokenizer: Tokenizer, seed: int, favoured: str = FAVOURED):
    """Target and drafter states, random but for a head that favours a few tokens."""
    target, drafter = _build(jax.random.key(seed))
    target["embedding"].set_value(50 * target["embedding"][...])
    # Attention as strong as the embedding: tokens depend on their context, and a lost row shows.
    for path, variable in nnx.to_flat_state(target):
        if path[-2:] in (("attention", "qkv"), ("attention", "output")):
            variable.set_value(10 * variable[...])
    scale = np.ones((CONFIG.vocab_size, 1), np.float32)
    scale[list(tokenizer.encode(favoured, specials=True))] = 3
    target["head"].set_value(target["head"][...] * jnp.asarray(5 * scale))
    return target, drafter


def write_checkpoint(
    folder: pathlib.Path,
    seed: int = 0,
    drafter: bool = True,
    *,
    config: ModelConfig = CONFIG,
    added: tuple[str, ...] = (),
    favoured: str = FAVOURED,
) -> pathlib.Path:
    """Saves a random checkpoint, its tokenizer with added tokens; returns its directory."""
    tokenizer = write_tokenizer(folder / "source-tokenizer.json", added=added)
    target, draft = random_params(tokenizer, seed, favoured)
    store.save(
        folder / "model",
        config,
        target,
        *((DRAFTER, draft) if drafter else ()),
        tokenizer=folder / "source-tokenizer.json",
        notes={"random": True},
    )
    return folder / "model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    """A checkpoint that tests read, and never change."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny"))
