"""Bytes on each device: what is meant to be divided is divided, and nothing else is repeated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Decoder, tiny_drafter, tiny_model

from mimo_jax.config import ModelConfig
from mimo_jax.decode.program import make_plan
from mimo_jax.drafter_config import DrafterConfig, MTPConfig
from mimo_jax.errors import MimoError
from mimo_jax.presets import drafter_preset, preset
from mimo_jax.sharding import AXIS, make_mesh

REPEATED = {"weight", "bias", "mask_embedding"}
"""Norms, router and mask embedding: small, and read whole by every device."""
DIVIDED = {
    "embedding",
    "head",
    "qkv",
    "output",
    "sink",
    "gate_up",
    "gate_up_scale",
    "down",
    "down_scale",
    "features",
    "projection",
    "query",
    "kv",
}


def bytes_by_name(state, shardings=None) -> dict[str, int]:
    """Bytes of all parameters of a name, on one device if shardings are given."""
    flat = dict(nnx.to_flat_state(shardings)) if shardings is not None else {}
    total: dict[str, int] = {}
    for path, parameter in nnx.to_flat_state(state):
        shape = flat[path].get_value().shard_shape(parameter.shape) if flat else parameter.shape
        size = int(np.prod(shape)) * jnp.dtype(parameter.dtype).itemsize
        total[path[-1]] = total.get(path[-1], 0) + size
    return total


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("layout", ["tensor", "expert"])
@pytest.mark.parametrize("name", ["mimo-nano", "mimo-v2.6-flash"])
def test_parameters_on_each_device(name, layout, devices):
    config, drafter = preset(name), drafter_preset(name)
    # Three layers are every kind there is; their widths are the real ones.
    config = dataclasses.replace(
        config, num_hidden_layers=3, hybrid_layer_pattern=(0, 1, 0), moe_layer_freq=(0, 1, 1)
    )
    changes = dict(num_hidden_layers=1, layer_types=(), target_layer_ids=(0, 1, 2))
    drafter = dataclasses.replace(drafter, **changes)
    mesh, kinds = make_mesh(devices), {"layout": layout, "dtype": jnp.bfloat16}
    plan = make_plan(config, drafter, mesh, **kinds)
    mtp = make_plan(config, MTPConfig(config, 2), mesh, **kinds)
    states = (*plan.params, mtp.params[1])
    for state, shardings in zip(
        states, (*plan.param_shardings, mtp.param_shardings[1]), strict=True
    ):
        whole, one = bytes_by_name(state), bytes_by_name(state, shardings)
        print(
            f"{name}, {layout} on {devices}: {sum(whole.values())} B, {sum(one.values())} a device"
        )
        assert set(whole) <= REPEATED | DIVIDED
        for parameter, size in whole.items():
            share = devices if parameter in DIVIDED else 1
            assert one[parameter] * share == size, parameter
        repeated = sum(size for key, size in whole.items() if key in REPEATED)
        assert repeated < 0.05 * sum(whole.values())


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_arrays_lie_where_the_table_says(devices, rng):
    shapes = np.random.default_rng(devices)
    target = tiny_model(shapes, devices)
    drafter = tiny_drafter(shapes, target, 4, devices)
    decoder = Decoder(rng, target, drafter, shards=devices, batch=2, max_len=30, block=4)
    state = decoder.empty()
    for caches, configs in (
        (state.caches, [target.attention(i) for i in range(target.num_hidden_layers)]),
        (state.contexts, [drafter.attention] * drafter.num_hidden_layers),
    ):
        for cache, config in zip(caches, configs, strict=True):
            heads = max(config.num_kv_heads // devices, 1)
            rows = 40 if config.window is None else config.window + 3
            assert cache.keys.addressable_shards[0].data.shape == (2, heads, rows, config.head_dim)
            values = cache.values.addressable_shards[-1].data.shape
            assert values == (2, heads, rows, config.v_head_dim)
    for params in decoder.params:
        for path, parameter in nnx.to_flat_state(params):
            sizes = {shard.data.nbytes for shard in parameter.get_value().addressable_shards}
            share = devices if path[-1] in DIVIDED else 1
            assert sizes == {parameter.get_value().nbytes // share}, path
            held = {shard.device for shard in parameter.get_value().addressable_shards}
            assert len(held) == devices


def test_expert_layout_holds_whole_experts():
    plan = make_plan(preset("mimo-nano"), None, make_mesh(8), layout="expert", dtype=jnp.float32)
    codes = plan.params[0]["layers"][1]["ffn"]["experts"]["gate_up"]
    where = plan.param_shardings[0]["layers"][1]["ffn"]["experts"]["gate_up"].get_value()
    assert where.shard_shape(codes.shape) == (4, *codes.shape[1:])
    assert where.mesh.axis_names == (AXIS,)


def fields(**changes) -> ModelConfig:
    return tiny_model(np.random.default_rng(0), 4, **changes)


@pytest.mark.parametrize(
    ("changes", "devices", "words"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, "6 query"),
        ({"vocab_size": 30}, 4, "embedding"),
        ({"intermediate_size": 42}, 4, r"ffn\.down .* 42 'mlp'"),
        ({"moe_intermediate_size": 18}, 4, r"experts\.down .* 18 'expert_mlp'"),
    ],
)
def test_a_mesh_that_cannot_divide_is_refused_by_name(changes, devices, words):
    config = fields(**({"swa_num_key_value_heads": 2} if len(changes) == 2 else {}), **changes)
    with pytest.raises(MimoError, match=words) as error:
        make_plan(config, None, make_mesh(devices), dtype=jnp.float32)
    assert "[1, 2" in str(error.value), "the message lists numbers of devices that work"


def test_too_many_devices_are_refused():
    with pytest.raises(MimoError, match="devices=9.*host_platform_device_count=9"):
        make_mesh(9)
    with pytest.raises(MimoError, match="devices=0"):
        make_mesh(0)
    assert make_mesh().shape[AXIS] == len(jax.devices())


def test_a_drafter_for_another_target_is_refused():
    target = fields()
    drafter = tiny_drafter(np.random.default_rng(1), target, 4, 1)
    wrong: DrafterConfig = type(drafter)(**(drafter.to_dict() | {"hidden_size": 100}))
    with pytest.raises(MimoError, match="hidden_size=100"):
        make_plan(target, wrong, make_mesh(1), dtype=jnp.float32)
