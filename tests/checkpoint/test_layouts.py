"""The table of stored tensors: published counts, refusals, and its two directions."""

import dataclasses
import functools
import math
from collections import Counter

import pytest

from mimo_jax.checkpoint.layout import LAYOUTS, MASK_EMBEDDING, RELEASES, Layout, backwards
from mimo_jax.checkpoint.recognition import compare, detect
from mimo_jax.checkpoint.xiaomi import declare, recipes
from mimo_jax.errors import MimoError
from mimo_jax.presets import drafter_preset, preset

ENCODERS = 364 + 75 + 20
"""Tensors of vision, audio and speech embeddings, which are not declared."""


@functools.cache
def release(name: str):
    """Tensors of a release without a drafter."""
    return declare(preset(name), None, RELEASES[name])


def totals(name: str):
    """Tensors of a release, and elements by dtype."""
    declared = release(name)
    elements = Counter()
    for (dtype, shape), times in Counter((t.dtype, t.shape) for t in declared.values()).items():
        elements[dtype] += times * math.prod(shape)
    return declared, elements


@pytest.mark.parametrize(
    ("name", "tensors", "u8", "fp8", "bf16", "f32"),
    [
        (
            "mimo-v2.6-flash",
            73_081,
            160_859_947_008,
            3_859_808_256,
            # Published with the encoders, which do not follow from the language model's shapes.
            4_101_308_032 - 989_721_600,
            248_192,
        ),
        (
            "mimo-v2.6-pro",
            160_040,
            531_351_207_936,
            13_378_781_184,
            # A hidden size larger by 2048 makes the encoders' last projections larger.
            10_647_286_656 - 989_721_600 - 2048 * (5120 + 16384),
            857_088,
        ),
    ],
)
def test_totals_of_v26_are_the_published_ones(name, tensors, u8, fp8, bf16, f32):
    declared, elements = totals(name)
    assert len(declared) + ENCODERS == tensors
    assert elements == {"U8": u8, "F8_E4M3": fp8, "BF16": bf16, "F32": f32}


@pytest.mark.slow
def test_totals_of_v25_pro_are_the_published_ones():
    declared, elements = totals("mimo-v2.5-pro")
    assert len(declared) == 159_581
    assert sum(elements.values()) == 1_023_244_718_976
    sizes = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    assert sum(sizes[dtype] * count for dtype, count in elements.items()) == 1_033_369_538_304


@pytest.mark.parametrize(
    ("name", "nbytes"), [("mimo-v2.6-flash", 2_936_114_304), ("mimo-v2.6-pro", 5_536_632_576)]
)
def test_the_drafter_is_the_published_one(name, nbytes):
    config = dataclasses.replace(
        preset(name), num_hidden_layers=1, hybrid_layer_pattern=(0,), moe_layer_freq=(0,)
    )
    both = declare(config, drafter_preset(name), "v2.6")
    drafter = {n: t for n, t in both.items() if n.startswith("dflash/")}
    mask = drafter.pop(MASK_EMBEDDING)
    assert len(drafter) == 63
    assert sum(tensor.nbytes for tensor in drafter.values()) == nbytes
    assert mask.shape == (preset(name).hidden_size,)


def test_shapes_of_attention_are_the_published_ones():
    def stored(name, layer, part):
        layer = f"model.layers.{layer}" if isinstance(layer, int) else f"model.mtp.{layer}"
        tensor = release(name)[f"{layer}.self_attn.{part}"]
        return tensor.dtype, tensor.shape

    scale = "qkv_proj.weight_scale_inv"
    assert stored("mimo-v2.6-flash", 0, "qkv_proj.weight") == ("F8_E4M3", (13568, 4096))
    assert stored("mimo-v2.6-flash", 0, scale) == ("F32", (108, 32))
    assert stored("mimo-v2.6-flash", 1, "qkv_proj.weight") == ("F8_E4M3", (14848, 4096))
    assert stored("mimo-v2.6-flash", 1, scale) == ("F32", (116, 32))
    assert stored("mimo-v2.6-flash", "layers.2", scale) == ("F32", (116, 32))
    for layer in (0, 1, "layers.0"):
        assert stored("mimo-v2.6-pro", layer, "qkv_proj.weight")[1] == (27136, 6144)
        assert stored("mimo-v2.6-pro", layer, scale)[1] == (216, 48)
    for layer, k, v in ((0, (8, 32), (4, 32)), (1, (12, 32), (8, 32))):
        assert stored("mimo-v2-flash", layer, "k_proj.weight_scale_inv")[1] == k
        assert stored("mimo-v2-flash", layer, "v_proj.weight_scale_inv")[1] == v


def test_a_value_head_begins_in_its_key_heads_last_tile():
    """MiMo-V2-Flash's full layers: rows 0-63 of a value head have the key head's second scale."""
    config = dataclasses.replace(preset("mimo-v2-flash"), n_routed_experts=8)
    table = recipes(config, None, "v2-flash")
    prefix = "model.layers.0.self_attn."
    group = [
        (run.tensor.removeprefix(prefix)[0], row)
        for run in table["target.layers.0.attention.qkv_scale"].runs[3]
        for row in range(run.start, run.stop)
        for _ in range(run.repeat)
    ]
    assert group[-5:] == [("k", 6), ("k", 6), ("k", 7), ("k", 7), ("v", 3)]
    assert group[:3] == [("q", 72), ("q", 72), ("q", 73)] and len(group) == 53


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backwards_fills_every_stored_row_once(layout):
    config, drafter = preset("mimo-nano"), drafter_preset("mimo-nano")
    config = dataclasses.replace(config, num_nextn_predict_layers=2)
    declared = declare(config, drafter, layout)
    table = recipes(config, drafter, layout)
    turned = backwards(table)
    assert turned.keys() == declared.keys()
    for name, pieces in turned.items():
        end = 0
        for piece in pieces:
            scale = table[piece.parameter].tile is not None
            assert piece.start == end or scale and piece.start < end, name
            end = max(end, piece.stop)
            assert table[piece.parameter].dtype == declared[name].dtype
            assert declared[name].parameter == piece.parameter
        assert end == declared[name].shape[0], name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_recognised_by_its_tensors(layout):
    config = dataclasses.replace(
        preset("mimo-nano"), num_nextn_predict_layers=1, moe_router_dtype="bfloat16"
    )
    declared = declare(config, None, layout)
    told = dataclasses.replace(config, num_nextn_predict_layers=0, moe_router_dtype="float32")
    found, amended = detect(told, declared)
    expected = "mxfp4" if layout == "v2.6" else "dense"
    assert amended == dataclasses.replace(config, expert_format=expected)
    assert declare(amended, None, found) == declared


def test_plain_scales_of_split_keys_are_recognised():
    layout = dataclasses.replace(LAYOUTS["v2-flash"], stacked=False)
    declared = declare(preset("mimo-v2-flash"), None, layout)
    assert declared["model.layers.0.self_attn.k_proj.weight_scale_inv"].shape == (6, 32)
    assert detect(preset("mimo-v2-flash"), declared)[0] == layout


def test_what_does_not_fit_is_named():
    declared = declare(preset("mimo-nano"), None, "v2.6")
    found = dict(declared) | {"visual.blocks.0.norm": declared["model.norm.weight"]}
    assert compare(found, declared) == ["visual.blocks.0.norm"]
    bias = "model.layers.2.mlp.gate.e_score_correction_bias"
    changed = found | {bias: declared[bias]._replace(dtype="BF16")}
    with pytest.raises(MimoError, match=rf"{bias} is BF16\[32\], not F32\[32\]"):
        compare(changed, declared)
    with pytest.raises(MimoError, match=rf"missing: 1 \({bias}\); not known: none"):
        compare({n: t for n, t in found.items() if n != bias}, declared)
    with pytest.raises(MimoError, match=r"not known: 1 \(model.extra\)"):
        compare(found | {"model.extra": declared[bias]}, declared)


def test_unknown_layouts_and_dtypes_are_refused():
    with pytest.raises(MimoError, match="layout='v3' is not known; there are v2-flash"):
        declare(preset("mimo-nano"), None, "v3")
    with pytest.raises(MimoError, match="experts weights as 'I8'"):
        Layout(fused=True, linear="BF16", experts="I8")
    odd = dataclasses.replace(preset("mimo-nano"), num_key_value_heads=8)
    with pytest.raises(MimoError, match="num_key_value_heads=8 chunks, which 8 query and 4 key"):
        declare(odd, None, "v2.5")
