"""Random tiny models, their compiled programs and decoding requests, shared by the tests."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.config import ModelConfig
from mimo_jax.decode.program import Settings, make_plan, make_program, state_maker
from mimo_jax.decode.sampling import Request
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.sharding import make_mesh


def tiny_model(rng: np.random.Generator, shards: int, **changes) -> ModelConfig:
    """A random target of two or three layers, both attention kinds and an MoE layer among them.

    Sizes are pairwise distinct where the mesh of `shards` devices lets them be.
    """
    layers = int(rng.integers(2, 4))
    pattern = ([0, 1] if rng.random() < 0.5 else [1, 0]) + [int(rng.integers(2))] * (layers - 2)
    sparse = [0] + [1] * (layers - 1) if rng.random() < 0.7 else [1] * (layers - 1) + [0]
    heads = shards * int(rng.integers(2, 4)) if shards < 8 else 8
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    kv = [n for n in divisors if max(n, shards) % min(n, shards) == 0]
    full_kv, swa_kv = (int(n) for n in rng.choice(kv, 2, replace=len(kv) < 2))
    head, swa_head = (int(n) for n in rng.permutation([8, 12]))
    fields = {
        "vocab_size": shards * (24 // shards + int(rng.integers(1, 4))),
        "hidden_size": shards * (32 // shards + int(rng.integers(1, 3))),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": full_kv,
        "swa_num_key_value_heads": swa_kv,
        "head_dim": head,
        "v_head_dim": 7,
        "swa_head_dim": swa_head,
        "swa_v_head_dim": 10,
        "hybrid_layer_pattern": tuple(pattern),
        "moe_layer_freq": tuple(sparse),
        "intermediate_size": shards * (40 // shards + 3),
        "moe_intermediate_size": shards * (16 // shards + 1),
        "n_routed_experts": shards * (1 + 6 // shards),
        "num_experts_per_tok": int(rng.integers(2, 4)),
        "partial_rotary_factor": 0.501,
        "rope_theta": 5e3,
        "swa_rope_theta": 1e2,
        "sliding_window": int(rng.integers(3, 9)),
        "max_position_embeddings": 128,
        "attention_value_scale": 0.707,
        "add_full_attention_sink_bias": bool(rng.integers(2)),
        "expert_format": "dense",
    }
    return ModelConfig(**(fields | changes))


def tiny_drafter(
    rng: np.random.Generator, target: ModelConfig, block: int, shards: int, **changes
) -> DrafterConfig:
    """A random drafter for that target."""
    heads = shards * int(rng.integers(1, 3)) if shards < 8 else 8
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    kv = [n for n in divisors if max(n, shards) % min(n, shards) == 0]
    taps = rng.permutation(target.num_hidden_layers)[: rng.integers(1, 3)]
    fields = {
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "num_hidden_layers": int(rng.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": int(rng.choice(kv)),
        "head_dim": 6,
        "intermediate_size": shards * (24 // shards + 5),
        "block_size": block,
        "mask_token_id": 3,
        "target_layer_ids": tuple(int(tap) for tap in taps),
        "rope_theta": 1e2,
        "sliding_window": block + int(rng.integers(6)),
        "attention_value_scale": 0.612,
        "add_swa_attention_sink_bias": True,
    }
    return DrafterConfig(**(fields | changes))


def randomise(state: nnx.State, rng: np.random.Generator, shardings, common: np.ndarray):
    """Fills all parameters with values large enough that every part of the model matters.

    `common` [d] is added to all embeddings, the mask's too: residual streams of target and drafter
    share it, and through the shared head some tokens are then likely for both.
    """
    strength = np.abs(common).mean()

    def fill(path, parameter, sharding):
        name = path[-1]
        shape, dtype = parameter.shape, parameter.dtype
        value = rng.standard_normal(shape) / np.sqrt(shape[-1])
        if dtype == jnp.uint8:
            low, high = (118, 123) if name.endswith("scale") else (0, 256)
            value = rng.integers(low, high, shape)
        elif name == "head":
            value *= 1.0 + strength
        elif name in ("embedding", "mask_embedding"):
            value = rng.standard_normal(shape) + common
        elif name == "projection":
            # Token and hidden state pass an MTP layer's input, and with them what is common.
            value += np.concatenate([np.eye(len(value))] * 2, axis=1)
        elif len(shape) == 1:
            value = (1.0 if name == "weight" else 0.0) + 0.3 * rng.standard_normal(shape)
        return parameter.replace(jax.device_put(value.astype(dtype), sharding.get_value()))

    where = dict(nnx.to_flat_state(shardings))
    flat = [(path, fill(path, p, where[path])) for path, p in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat)


class Decoder:
    """A compiled tiny model: parameters, program and empty states, and one call to decode.

    Args:
      rng: of the parameters' values.
      target: shapes of the target.
      drafter: shapes of the drafter, or None.
      shards: devices of the mesh.
      layout: "tensor" or "expert".
      batch: sequences.
      max_len: tokens that a sequence may have.
      block: rows of a verified block.
      chunk: rows of a prefill pass.
    """

    def __init__(
        self,
        rng,
        target,
        drafter,
        *,
        shards=1,
        layout="tensor",
        batch=1,
        max_len=64,
        block=4,
        chunk=16,
        dtype=jnp.float32,
    ):
        self.plan = make_plan(target, drafter, make_mesh(shards), layout=layout, dtype=dtype)
        self.settings = Settings(
            batch=batch, max_len=max_len, block=block, chunk=chunk, dtype=dtype
        )
        self.program = make_program(self.plan, self.settings)
        self.empty = state_maker(self.plan, self.settings)
        self.reset(rng)

    def reset(self, rng: np.random.Generator, agreement: float = 1.0) -> None:
        """New parameters for the same compiled program; see `randomise` for how drafts agree."""
        common = agreement * rng.standard_normal(self.plan.config.hidden_size)
        self.params = tuple(
            None if state is None else randomise(state, rng, sharding, common)
            for state, sharding in zip(self.plan.params, self.plan.param_shardings, strict=True)
        )

    def start(self, prompts: list[np.ndarray]):
        """A state that holds the prompts, nothing of them cached."""
        state = self.empty()
        tokens = np.zeros(state.tokens.shape, np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        length = np.array([len(prompt) for prompt in prompts], np.int32)
        return dataclasses.replace(
            state,
            tokens=jax.device_put(tokens, state.tokens.sharding),
            length=jax.device_put(length, state.length.sharding),
        )

    def request(self, **changes) -> Request:
        """A greedy request up to the cache's end, with other values where given."""
        return make_request(self.settings.batch, **{"limit": self.settings.max_len} | changes)

    def __call__(self, state, **changes):
        """Runs the program on a state (donated), or on a list of prompts."""
        if isinstance(state, list):
            state = self.start(state)
        return self.program(self.params, state, self.request(**changes))

    def merge(self):
        """The target and the drafter as modules, to call without the program."""
        return tuple(
            None if graph is None else nnx.merge(graph, params)
            for graph, params in zip(self.plan.graphs, self.params, strict=True)
        )


def make_request(batch: int, *, limit, **changes) -> Request:
    """A request whose per-sequence values may be given as one number for all."""
    kinds = {
        "limit": (np.int32, limit),
        "pause": (np.int32, limit),
        "temperature": (np.float32, 0.0),
        "top_p": (np.float32, 1.0),
        "top_k": (np.int32, 0),
        "sequence": (np.int32, np.arange(batch)),
    }
    values = {
        name: np.broadcast_to(changes.pop(name, default), batch).astype(dtype)
        for name, (dtype, default) in kinds.items()
    }
    eos = np.full(2, -1, np.int32)
    given = np.atleast_1d(np.asarray(changes.pop("eos", []), np.int32))
    eos[: len(given)] = given
    values["eos"] = eos
    values["seed"] = np.uint32(changes.pop("seed", 0))
    values["max_draft"] = np.int32(changes.pop("max_draft", 0))
    assert not changes, changes
    return Request(**{name: jnp.asarray(value) for name, value in values.items()})


def emitted(state, prompts: list[np.ndarray]) -> list[list[int]]:
    """The tokens after each prompt."""
    tokens, length = np.asarray(state.tokens), np.asarray(state.length)
    return [
        row[len(prompt) : end].tolist()
        for row, prompt, end in zip(tokens, prompts, length, strict=True)
    ]
