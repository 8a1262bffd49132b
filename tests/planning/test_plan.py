"""The plan: published totals to the byte, and the bytes of arrays that are really there."""

import dataclasses
import itertools
import json
import math
from collections import Counter
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Decoder, tiny_drafter, tiny_model
from jax.sharding import Mesh
from tiny_checkpoint import checkpoint  # noqa: F401

import mimo_jax
from mimo_jax import cli
from mimo_jax.checkpoint import store
from mimo_jax.checkpoint.layout import BYTES, RELEASES
from mimo_jax.checkpoint.xiaomi import declare
from mimo_jax.decode.program import Settings, make_plan
from mimo_jax.errors import MimoError
from mimo_jax.planning import memory
from mimo_jax.planning.groups import group_of
from mimo_jax.planning.report import plan
from mimo_jax.planning.routing import busiest_device, distinct_experts
from mimo_jax.planning.sizes import (
    abstract_mesh,
    caches_of,
    longest_context,
    needs,
    total,
    weights_of,
)
from mimo_jax.presets import preset

MILLION = 1 << 20
PUBLISHED = {
    # Of the headers of MiMo-V2.6-Flash-RL and MiMo-V2.6-Pro-RL, and sizes computed from them.
    "mimo-v2.6-flash": {
        "tensors": 73_081,
        "U8": 160_859_947_008,
        "F8_E4M3": 3_859_808_256,
        "BF16": 4_101_308_032,
        "F32": 248_192,
        "expert tensors": 36_096,
        "drafter": 2_936_114_304,
        "reads": {"experts": 5.03, "attention qkv": 2.87, "attention output": 3.22, "head": 1.25},
        "router, layer 0": 0.30,
        "forward": 12.7,
        "token": 23_040,
        "million": 24.2,
        "windows": 25.6,
    },
    "mimo-v2.6-pro": {
        "tensors": 160_040,
        "U8": 531_351_207_936,
        "F8_E4M3": 13_378_781_184,
        "BF16": 10_647_286_656,
        "F32": 857_088,
        "expert tensors": 79_488,
        "drafter": 5_536_632_576,
        "reads": {
            "experts": 11.07,
            "attention qkv": 11.67,
            "attention output": 14.09,
            "head": 1.87,
        },
        "router, layer 0": 0.63,
        "forward": 39.3,
        "token": 51_200,
        "million": 53.7,
        "windows": 39.3,
    },
}


@pytest.fixture(scope="module", params=sorted(PUBLISHED))
def released(request):
    """A release on one device, the tensors of its layout, and what is published of it."""
    name = request.param
    declared = declare(preset(name), None, RELEASES[name])
    return plan(name, devices=1, max_len=MILLION), declared, PUBLISHED[name]


def bytes_of(tensors) -> int:
    """Of many tensors, most of them alike: each kind is measured once."""
    kinds = Counter((tensor.dtype, tensor.shape) for tensor in tensors)
    return sum(n * BYTES[dtype] * math.prod(shape) for (dtype, shape), n in kinds.items())


def test_stored_totals_are_the_published_ones(released):
    made, declared, published = released
    stored = made.stored
    assert stored.tensors == published["tensors"]
    assert stored.elements == {kind: published[kind] for kind in ("U8", "F8_E4M3", "BF16", "F32")}
    assert (stored.drafter_tensors, stored.drafter_bytes) == (63, published["drafter"])
    # What the encoders hold is a figure of its own: all else is counted from the layout.
    assert len(declared) == published["tensors"] - (364 + 75 + 20)
    codes = [n for n, t in declared.items() if t.dtype == "U8" and n.endswith("_proj.weight")]
    assert len(codes) == published["expert tensors"]
    own = bytes_of(t for t in declared.values() if t.dtype == "BF16") // 2
    assert own + stored.encoder_elements == published["BF16"]


def test_bytes_of_a_forward_pass_are_the_published_ones(released):
    made, declared, published = released
    reads = dict(made.rounds["plain"].weights)
    assert made.forward_bytes == sum(reads.values())
    # The published figure leaves the scales out: they are less than a thousandth of it.
    codes = bytes_of(
        tensor
        for tensor in declared.values()
        if tensor.parameter.startswith("target") and tensor.parameter.endswith("attention.qkv")
    )
    assert codes < reads["attention qkv"] < 1.001 * codes
    reads["attention qkv"] = codes
    for group, size in published["reads"].items():
        assert round(reads[group] / 1e9, 2) == size, group
    rest = reads["router"] + reads["dense MLP"]
    assert round(rest / 1e9, 2) == published["router, layer 0"]
    assert round(made.forward_bytes / 1e9, 1) == published["forward"]
    assert made.weights["experts"] == published["U8"]
    drafted = made.rounds["drafted"].weights
    # Its mask embedding, which lies beside its tensors, is read too.
    embedding = 2 * preset(made.name).hidden_size
    assert drafted["drafter"] == published["drafter"] + embedding
    assert drafted["head, for the drafter"] == reads["head"]


def test_bytes_of_the_caches_are_the_published_ones(released):
    made, _, published = released
    assert made.token_bytes == published["token"]
    assert round(made.token_bytes * MILLION / 1e9, 1) == published["million"]
    assert round(made.window_bytes / 1e6, 1) == published["windows"]
    full = made.caches["full attention"]
    assert full == (MILLION + made.block) * made.token_bytes


def test_parameters_are_the_stored_tensors(released):
    """Our tree and Xiaomi's files are two declarations: group by group they hold the same bytes."""
    made, declared, _ = released
    groups = {name: group_of(name) for name in {t.parameter for t in declared.values()}}
    members: dict[str, list] = {}
    for tensor in declared.values():
        members.setdefault(groups[tensor.parameter], []).append(tensor)
    stored = {group: bytes_of(tensors) for group, tensors in members.items()}
    del stored["MTP layers"]
    ours = {group: size for group, size in made.weights.items() if group != "drafter"}
    # The scales of ours are finer: a row for 64 rows of heads, where tiles have 128.
    assert 0 < ours.pop("attention qkv") - stored.pop("attention qkv") < 0.001 * made.needed
    assert ours == stored


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", ["tensor", "expert"])
def test_bytes_are_those_of_real_arrays(devices, layout, rng):
    shapes = np.random.default_rng(devices)
    width = 32 if layout == "expert" else 32 * devices
    packed = {"expert_format": "mxfp4", "hidden_size": 64, "moe_intermediate_size": width}
    target = tiny_model(shapes, devices, **packed)
    drafter = tiny_drafter(shapes, target, 4, devices)
    decoder = Decoder(rng, target, drafter, shards=devices, layout=layout, batch=2, block=4)
    options = {"layout": layout, "dtype": jnp.float32}
    placed = make_plan(target, drafter, abstract_mesh(devices), **options)

    def held(tree) -> int:
        shards = [s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards]
        sizes = [0] * devices
        for shard in shards:
            sizes[shard.device.id] += shard.data.nbytes
        assert len(set(sizes)) == 1
        return sizes[0]

    weights, state = weights_of(placed), decoder.empty()
    assert sum(weights.values()) == held(decoder.params)
    assert weights["drafter"] == held(decoder.params[1])
    caches = caches_of(placed, decoder.settings)
    assert sum(caches.values()) == held(state)
    assert caches["drafter's contexts"] == held(state.contexts)
    full = [
        cache for layer, cache in enumerate(state.caches) if target.attention(layer).window is None
    ]
    assert caches["full attention"] == held(full)


def test_the_longest_context_is_the_longest(rng):
    target = tiny_model(rng, 2)
    placed = make_plan(target, None, abstract_mesh(2), dtype=jnp.float32)
    settings = Settings(batch=1, max_len=1, block=4, chunk=16, dtype=jnp.float32)

    def needed(max_len: int) -> int:
        return total(needs(placed, dataclasses.replace(settings, max_len=max_len)))

    context = target.max_position_embeddings
    for memory_ in (needed(1), needed(2) - 1, int(rng.integers(needed(3), needed(context)))):
        longest = longest_context(placed, settings, memory_)
        assert needed(longest) <= memory_ < needed(longest + 1)
    assert longest_context(placed, settings, needed(context)) == context
    assert longest_context(placed, settings, needed(0) - 1) == 0


@pytest.mark.parametrize(("experts", "choices", "tokens", "devices"), [(6, 2, 2, 3), (8, 3, 2, 2)])
def test_expected_experts_are_those_of_all_choices(experts, choices, tokens, devices):
    sets = list(itertools.combinations(range(experts), choices))
    unions = [set().union(*drawn) for drawn in itertools.product(sets, repeat=tokens)]
    mean = np.mean([len(union) for union in unions])
    assert distinct_experts(experts, choices, tokens) == pytest.approx(mean, rel=1e-12)
    each = experts // devices
    most = [max(np.bincount([e // each for e in union], minlength=devices)) for union in unions]
    got = busiest_device(experts, choices, tokens, devices)
    assert got == pytest.approx(np.mean(most), rel=1e-12)
    assert got > mean / devices


def test_rounds_read_what_the_layouts_make_them_read():
    tensor, expert = (plan("mimo-nano", 4, 512, layout=name) for name in ("tensor", "expert"))
    config = preset("mimo-nano")
    for name in ("plain", "drafted"):
        one, other = tensor.rounds[name], expert.rounds[name]
        assert (
            one.experts
            == other.experts
            == pytest.approx(
                distinct_experts(config.n_routed_experts, config.num_experts_per_tok, one.rows)
            )
        )
        share = one.weights["experts"] / tensor.weights["experts"]
        assert share == pytest.approx(one.experts / config.n_routed_experts, rel=1e-4)
        assert other.weights["experts"] > one.weights["experts"], "some device has more than others"
    assert "drafter" not in tensor.rounds["plain"].weights
    assert tensor.seconds("plain") == tensor.rounds["plain"].nbytes / tensor.bandwidth


def test_a_config_alone_is_enough(tmp_path):
    """As before a download: the configuration says how the weights will be stored."""
    config = dataclasses.replace(preset("mimo-nano"), expert_format="mxfp4")
    fields = config.to_dict() | {"quantization_config": {"quant_method": "fp8"}}
    fields["quantization_config"]["store_dtype"] = "mxfp4"
    (tmp_path / "config.json").write_text(json.dumps(fields))
    stored = plan(tmp_path, 1, 512)
    plain = plan(config, 1, 512)
    assert stored.stored is None and stored.weights["experts"] == plain.weights["experts"]
    assert 0.5 < stored.weights["attention qkv"] / plain.weights["attention qkv"] < 0.51
    # The files have begun to come: nothing changes.
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    assert plan(tmp_path, 1, 512) == stored


def test_mtp_layers_are_a_drafter_too():
    config = dataclasses.replace(preset("mimo-nano"), num_nextn_predict_layers=2)
    made = plan(config, 2, 512, drafter="mtp")
    assert made.block == 3 and made.rounds["drafted"].rows == 3
    reads = made.rounds["drafted"].weights
    assert reads["MTP layers"] == made.weights["MTP layers"] > 0
    assert reads["head, for the drafter"] == 2 * reads["head"], "one pass for each draft"
    assert "MTP layers" not in made.rounds["plain"].weights
    with pytest.raises(MimoError, match="drafter='dflash' is not allowed.*has 'mtp'"):
        plan(config, drafter="dflash")


def test_load_refuses_what_cannot_fit(checkpoint, monkeypatch):  # noqa: F811
    monkeypatch.setattr(store, "load", lambda *a, **k: pytest.fail("it began to load"))
    options = {"devices": 2, "max_len": 170, "progress": False}
    monkeypatch.setattr(memory, "host_memory", lambda: 4_000_000)
    with pytest.raises(MimoError, match="This model needs .* on each of 2 device") as error:
        mimo_jax.load(checkpoint, **options)
    for words in ("max_len=170", "weights", "caches", "workspace", "1/2 of this machine", "2.0 MB"):
        assert words in str(error.value)
    assert "What would fit" in str(error.value)


@pytest.mark.parametrize(
    ("stats", "free"),
    [({"bytes_limit": 900, "bytes_in_use": 200}, 700), ({"bytes_limit": 900}, 900), (None, None)],
)
def test_a_gpu_says_how_much_is_free(stats, free):
    device = mock.Mock(platform="gpu", device_kind="NVIDIA H200", id=3)
    device.memory_stats.return_value = stats
    mesh = mock.Mock(spec=Mesh, devices=np.array([device, device]))
    memory_, whose = memory.device_memory(mesh)
    assert memory_ == free and (whose == "NVIDIA H200 3" or free is None)


def test_what_the_refusal_names_does_fit(checkpoint, monkeypatch):  # noqa: F811
    with mimo_jax.load(checkpoint, devices=1, max_len=170, progress=False) as engine:
        settings = Settings(batch=1, max_len=170, block=5, chunk=256, dtype=jnp.float32)
        enough = total(needs(engine._plan, settings))
    monkeypatch.setattr(memory, "host_memory", lambda: enough)
    mimo_jax.load(checkpoint, devices=1, max_len=170, progress=False).close()
    monkeypatch.setattr(memory, "host_memory", lambda: enough - 1)
    with pytest.raises(MimoError, match=r"max_len=(\d+) or less") as error:
        mimo_jax.load(checkpoint, devices=1, max_len=170, progress=False)
    longest = int(str(error.value).split("load with max_len=")[1].split()[0])
    assert 2 <= longest < 170
    mimo_jax.load(checkpoint, devices=1, max_len=longest, progress=False).close()


def test_the_command(capsys):
    assert cli.main(["plan", "mimo-nano", "--devices", "2", "--max-len", "99", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    made = plan("mimo-nano", 2, 99)
    assert figures == json.loads(json.dumps(made.to_dict()))
    assert figures["fits"] and figures["needed"] == made.needed
    assert cli.main(["plan", "mimo-nano", "--devices", "2", "--hbm-gb", "0.001"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "1.0 MB" in out
    assert cli.main(["plan", "mimo-v3"]) == 1
    assert "presets: mimo-nano" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"devices": 0}, "devices=0"),
        ({"max_len": 0}, "max_len=0"),
        ({"layout": "rows"}, "layout='rows'"),
        ({"devices": 3}, "devices=3 cannot divide"),
        ({"block": 0}, "block=0"),
        ({"memory": float("nan")}, "memory=nan is not allowed: it must be a number above 0"),
        ({"memory": float("inf")}, "memory=inf"),
        ({"bandwidth": 0}, "bandwidth=0"),
        ({"bandwidth": -3.0}, "bandwidth=-3.0"),
        ({"experts": "fp8"}, "experts='fp8' .* 'auto' or 'mxfp4'"),
    ],
)
def test_what_is_not_allowed_is_named(arguments, words):
    with pytest.raises(MimoError, match=words):
        plan("mimo-nano", **({"devices": 1} | arguments))


def test_experts_of_an_fp8_release():
    """In bfloat16 they are four times what they are in MXFP4, and the way out is named."""
    as_loaded, packed = (plan("mimo-v2.5-pro", experts=experts) for experts in ("auto", "mxfp4"))
    ratio = as_loaded.weights["experts"] / packed.weights["experts"]
    assert ratio == pytest.approx(16 / 4.25)
    assert packed.fits and not as_loaded.fits
    assert "experts='mxfp4' holds them in 4 bits" in str(as_loaded) and not packed.notes
    assert "max_len=2,000,000 is cut" in str(plan("mimo-nano", 1, 2_000_000))
