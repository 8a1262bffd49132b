"""Checkpoints written by an independent writer load to exactly the weights that were written."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from helpers import make_request
from oracles import to_tree
from xiaomi_writer import CONFIG, DRAFTER, MTP_LAYERS, RELEASES, Writer

from mimo_jax.checkpoint import released, store
from mimo_jax.checkpoint.flat import flatten
from mimo_jax.decode.program import Settings, make_plan, make_program, state_maker
from mimo_jax.errors import MimoError
from mimo_jax.quant import mxfp4
from mimo_jax.sharding import make_mesh


def expected(writer: Writer, draft: dict) -> dict[str, np.ndarray]:
    """What was written, as our parameters in float32 on one device, by the oracles' own map."""
    parts = {"target": to_tree.target(CONFIG, writer.values)}
    if draft:
        parts["drafter"] = to_tree.drafter(DRAFTER, draft)
    if "model.mtp.layers.0.enorm.weight" in writer.values:
        weights = to_tree.under(writer.values, "model.mtp.")
        parts["mtp"] = to_tree.mtp(CONFIG, weights, layers=MTP_LAYERS, hidden_normed=False)
    return flatten({part: nnx.state(module) for part, module in parts.items()})


def differing(checkpoint: released.Released, wanted: dict[str, np.ndarray]) -> list[str]:
    """Parameters that are not, bit for bit, what was written."""
    assembler = checkpoint.assembler()
    names = [name for name in assembler.table if not name.endswith("_scale")]
    assert sorted(names) == sorted(wanted)
    for name in names:
        checkpoint.check_rows(name)
    return [n for n in names if not np.array_equal(assembler.values(n, np.float32), wanted[n])]


@pytest.mark.parametrize("release", RELEASES)
def test_every_tensor_is_what_was_written(release, files):
    folder, writer, draft = files(release)
    checkpoint = released.open_released(folder)
    assert differing(checkpoint, expected(writer, draft)) == []
    sizes = [a.nbytes for n, a in writer.stored.items() if not n.startswith(released.SKIPPED)]
    assert checkpoint.nbytes == sum(sizes) + sum(2 * a.size for a in draft.values())


def test_codes_are_the_files_bytes(files):
    """MXFP4 payloads and FP8 codes stay as they are."""
    folder, writer, _ = files("v2.6")
    assembler = released.open_released(folder).assembler()
    for suffix, stored in (("", ".weight"), ("_scale", ".weight_scale")):
        both = assembler.stored(f"target.layers.2.ffn.experts.gate_up{suffix}")
        down = assembler.stored(f"target.layers.2.ffn.experts.down{suffix}")
        assert both.dtype == down.dtype == np.uint8
        for expert in range(CONFIG["n_routed_experts"]):
            prefix = f"model.layers.2.mlp.experts.{expert}."
            names = [f"{prefix}{part}_proj{stored}" for part in ("gate", "up", "down")]
            for ours, name in zip((*both[expert], down[expert]), names, strict=True):
                assert np.array_equal(ours, writer.stored[name])
    qkv = assembler.stored("target.layers.1.attention.qkv")
    stored = writer.stored["model.layers.1.self_attn.qkv_proj.weight"]
    rows, kept = ([row.tobytes() for row in a.reshape(-1, a.shape[-1])] for a in (qkv, stored))
    assert sorted(rows) == sorted(kept) and rows != kept


@pytest.mark.parametrize("release", ["v2-flash", "v2.5", "v2.6"])
def test_any_part_is_a_part_of_the_whole(release, files, rng):
    assembler = released.open_released(files(release)[0]).assembler(shards=4)
    names = [
        "target.embedding",
        "target.layers.0.attention.qkv",
        "target.layers.0.attention.qkv_scale",
        "target.layers.0.ffn.gate_up",
        "target.layers.1.attention.output",
        "target.layers.1.attention.sink",
        "target.layers.1.ffn.experts.down",
        "target.layers.2.ffn.experts.gate_up",
        "drafter.layers.0.attention.kv",
        "mtp.layers.1.attention.qkv",
    ]
    for name in names:
        for read in (assembler.stored, lambda n, i=None: assembler.values(n, np.float32, i)):
            whole = read(name)
            for _ in range(3):
                starts = [int(rng.integers(size)) for size in whole.shape]
                index = tuple(
                    slice(start, int(rng.integers(start + 1, size + 1)))
                    for start, size in zip(starts, whole.shape, strict=True)
                )
                assert np.array_equal(read(name, index), whole[index]), (name, index)


@pytest.mark.parametrize("release", ["v2.5", pytest.param("bf16", marks=pytest.mark.slow)])
def test_experts_become_mxfp4_on_request(release, files):
    """By our quantiser, whichever part of codes or scales is asked for first."""
    folder, writer, draft = files(release)
    wanted = expected(writer, draft)
    assembler = released.open_released(folder).assembler()
    for name in ("target.layers.2.ffn.experts.down",):
        codes, scales = (np.asarray(a) for a in mxfp4.quantize(jnp.asarray(wanted[name])))
        assert np.array_equal(assembler.make(name, np.uint8), codes)
        assert np.array_equal(assembler.make(f"{name}_scale", np.uint8), scales)
        lead = (slice(3, 6),) + (slice(None),) * (codes.ndim - 2)
        for half in (1, 0):
            part = slice(half * 64, half * 64 + 64)
            assert np.array_equal(
                assembler.make(f"{name}_scale", np.uint8, (*lead, slice(4 * half, 4 * half + 4))),
                scales[(*lead, slice(4 * half, 4 * half + 4))],
            )
            assert np.array_equal(
                assembler.make(name, np.uint8, (*lead, part)), codes[(*lead, part)]
            )


def plan_for(checkpoint, devices: int, **options):
    return make_plan(checkpoint.config, checkpoint.drafter, make_mesh(devices), **options)


def repeated(array: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Key/value heads as more devices than there are heads hold them, made head by head."""
    if array.shape == tuple(shape):
        return array
    attention = {"qkv": (192, 128), "kv": (24, 24)}[name.split(".")[-1]]
    queries = array.shape[1] - sum(attention)
    copies = shape[0] // array.shape[0]
    share = queries // copies
    return np.stack([
        np.concatenate([head[part * share : (part + 1) * share], head[queries:]])
        for head in array for part in range(copies)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("release", "devices", "dtype"),
    [
        ("v2.6", 8, np.float32),
        ("v2-flash", 4, ml_dtypes.bfloat16),
        ("v2.5", 2, np.float32),
        ("bf16", 1, ml_dtypes.bfloat16),
    ],
)
def test_loading_onto_a_mesh(release, devices, dtype, files):
    folder, writer, draft = files(release)
    checkpoint = released.open_released(folder)
    plan = plan_for(checkpoint, devices, packed=False, dtype=dtype)
    seen = []
    params = released.load(
        checkpoint,
        plan.params,
        plan.param_shardings,
        lambda done, total: seen.append((done, total)),
    )
    loaded = flatten({"target": params[0], "drafter": params[1]})
    wanted = {n: a for n, a in expected(writer, draft).items() if not n.startswith("mtp.")}
    assert loaded.keys() == wanted.keys()
    exact = (".router.",)
    for name, array in wanted.items():
        array = repeated(array, name, loaded[name].shape)
        array = array if any(part in name for part in exact) else array.astype(dtype)
        assert np.array_equal(loaded[name].astype(np.float32), array.astype(np.float32)), name
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_codes_on_a_mesh(files):
    """FP8 and MXFP4 kept, on two devices, decode to what was written."""
    folder, writer, draft = files("v2.6")
    checkpoint = released.open_released(folder)
    plan = plan_for(checkpoint, 2, packed=True, fp8=True, dtype=jnp.bfloat16)
    target, _ = released.load(checkpoint, plan.params, plan.param_shardings)
    arrays, wanted = flatten(target), expected(writer, draft)
    for name in ("layers.0.attention.qkv", "layers.0.ffn.down", "layers.1.ffn.experts.down"):
        codes, scales = arrays[name], arrays[f"{name}_scale"]
        if codes.dtype == np.uint8:
            values = mxfp4.dequantize_float64(codes, scales)
        else:
            unit = 64 if name.endswith("qkv") else 128
            scales = np.repeat(np.repeat(scales, unit, -2), 128, -1)
            scales = scales[..., : codes.shape[-2], : codes.shape[-1]]
            values = codes.astype(np.float32) * scales
        assert np.array_equal(values, wanted[f"target.{name}"]), name
    assert arrays["layers.1.ffn.router.weight"].dtype == ml_dtypes.bfloat16


@pytest.mark.slow
def test_codes_survive_our_own_format(files, tmp_path):
    """Saved with FP8 and MXFP4, then loaded decoded on eight devices and as codes on two."""
    folder, writer, draft = files("v2.6")
    checkpoint = released.open_released(folder)
    plan = plan_for(checkpoint, 1, packed=True, fp8=True, dtype=jnp.bfloat16)
    target, drafter = released.load(checkpoint, plan.params, plan.param_shardings)
    store.save(tmp_path / "ours", checkpoint.config, target, checkpoint.drafter, drafter)
    ours = store.open_checkpoint(tmp_path / "ours")
    assert ours.fp8 and ours.packed
    decoded = plan_for(ours, 8, packed=False, dtype=jnp.float32)
    loaded = flatten(store.load(ours, decoded.params, decoded.param_shardings)[0])
    source = expected(writer, {})
    for name, array in loaded.items():
        wanted = repeated(source[f"target.{name}"], name, array.shape)
        assert np.array_equal(array.astype(np.float32), wanted), name
    kept = plan_for(ours, 2, packed=True, fp8=True, dtype=jnp.bfloat16)
    codes = flatten(store.load(ours, kept.params, kept.param_shardings)[0])
    for name, array in flatten(target).items():
        assert np.array_equal(codes[name], array), name


@pytest.fixture(scope="module")
def generate(files):
    """One compiled program for all layouts: greedy tokens of given parameters."""
    checkpoint = released.open_released(files("v2.5")[0])
    plan = plan_for(checkpoint, 1, packed=False, dtype=jnp.float32)
    settings = Settings(batch=1, max_len=48, block=5, chunk=16, dtype=jnp.float32)
    program, empty = make_program(plan, settings), state_maker(plan, settings)
    prompt = np.random.default_rng(3).integers(0, 320, 11)

    def run(params) -> list[int]:
        state = empty()
        tokens = np.zeros(state.tokens.shape, np.int32)
        tokens[0, : len(prompt)] = prompt
        state = dataclasses.replace(
            state,
            tokens=jax.device_put(tokens, state.tokens.sharding),
            length=jax.device_put(np.array([len(prompt)], np.int32), state.length.sharding),
        )
        state = program(params, state, make_request(1, limit=48, max_draft=4))
        return np.asarray(state.tokens)[0].tolist()

    return plan, run


@pytest.mark.parametrize("release", RELEASES)
def test_greedy_tokens_are_those_of_the_source(release, files, generate):
    folder, writer, draft = files(release)
    plan, run = generate
    loaded = run(released.load(released.open_released(folder), plan.params, plan.param_shardings))
    source = expected(writer, draft)
    placed = tuple(
        nnx.from_flat_state(
            (path, leaf.replace(jnp.asarray(source[f"{part}.{'.'.join(map(str, path))}"])))
            for path, leaf in nnx.to_flat_state(state)
        )
        for part, state in zip(("target", "drafter"), plan.params, strict=True)
    )
    assert loaded == run(placed)


def planted(tmp_path, release: str, mistake: str, rng, name: str = "planted"):
    """Writes a checkpoint with a mistake in it, without a drafter."""
    writer = Writer(release, rng, mistake)
    folder = tmp_path / name
    shutil.rmtree(folder, ignore_errors=True)
    writer.write(folder, drafter=False)
    return folder, writer


@pytest.mark.parametrize(
    ("release", "mistake", "names"),
    [
        (
            "v2.6",
            "flat qkv on sliding layers",
            ["target.layers.1.attention.qkv"]
            + [f"mtp.layers.{layer}.attention.qkv" for layer in range(MTP_LAYERS)],
        ),
        (
            "v2.6",
            "high nibble first",
            [f"target.layers.{i}.ffn.experts.{n}" for i in (1, 2) for n in ("gate_up", "down")],
        ),
        (
            "fused-bf16",
            "flat qkv",
            [f"target.layers.{i}.attention.qkv" for i in (0, 1, 2)]
            + [f"mtp.layers.{i}.attention.qkv" for i in range(MTP_LAYERS)],
        ),
    ],
)
def test_rows_and_nibbles_in_another_order_are_seen(release, mistake, names, tmp_path, rng):
    """What no file tells by itself: the comparison with the source names just what differs."""
    folder, writer = planted(tmp_path, release, mistake, rng)
    found = differing(released.open_released(folder), expected(writer, {}))
    assert sorted(found) == sorted(names)


@pytest.mark.parametrize("mistake", ["flat qkv", "scales of each segment"])
def test_fp8_rows_in_another_order_are_refused(mistake, tmp_path, rng):
    for attempt in range(20):  # Half a tile may hold the largest weight by chance.
        folder, _ = planted(tmp_path, "v2.5", mistake, rng, f"planted{attempt}")
        checkpoint = released.open_released(folder)
        try:
            checkpoint.check_rows("target.layers.0.attention.qkv")
        except MimoError as error:
            assert "model.layers.0.self_attn.qkv_proj.weight" in str(error)
            assert "2 chunks [Q|K|V]" in str(error) and "use the original release" in str(error)
            return
    raise AssertionError("20 checkpoints with rows in another order were accepted")


def test_tiles_of_zeros_prove_nothing_and_one_short_tile_is_too_many(files, monkeypatch):
    checkpoint = released.open_released(files("v2.5")[0])
    name = "target.layers.2.attention.qkv"
    codes = checkpoint.read("model.layers.2.self_attn.qkv_proj.weight").copy()
    monkeypatch.setattr(released.Released, "read", lambda self, name: codes)
    codes[:128, 128:256] = 0
    checkpoint.check_rows(name)
    tile = codes.view(np.uint8)[1088:1216, :128]
    tile[(tile & 0x7F) == 0x7E] -= 1
    with pytest.raises(MimoError, match="1 of 53 tiles"):
        checkpoint.check_rows(name)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        (
            "bias in bf16",
            r"model\.layers\.1\.mlp\.gate\.e_score_correction_bias is BF16\[11\], not F32\[11\]",
        ),
        ("missing tensor", r"missing: 1 \(model\.layers\.1\.mlp\.experts\.10\.up_proj\.weight\)"),
        ("surplus tensor", r"not known: 1 \(model\.layers\.3\.input_layernorm\.weight\)"),
    ],
)
def test_tensors_that_do_not_belong_are_named(mistake, words, tmp_path, rng):
    folder, _ = planted(tmp_path, "v2.6", mistake, rng)
    with pytest.raises(MimoError, match=words):
        released.open_released(folder)
