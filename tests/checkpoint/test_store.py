"""The checkpoint store: exact round trips, all damage is seen, meshes get what they need."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from tiny_checkpoint import CONFIG, DRAFTER, checkpoint, random_params, write_tokenizer  # noqa: F401

from mimo_jax.checkpoint import store
from mimo_jax.checkpoint.flat import flatten, nest
from mimo_jax.decode.program import make_plan
from mimo_jax.errors import MimoError
from mimo_jax.quant.mxfp4 import dequantize_float64
from mimo_jax.sharding import make_mesh


def read(directory, devices=1, packed=True, dtype=jnp.float32, drafter=True):
    """Loads a checkpoint: the opened one, and arrays by name."""
    opened = store.open_checkpoint(directory)
    draft = opened.drafter if drafter else None
    plan = make_plan(opened.config, draft, make_mesh(devices), packed=packed, dtype=dtype)
    states = store.load(opened, plan.params, plan.param_shardings)
    assert jax.tree.structure(states) == jax.tree.structure(plan.params)
    for wanted, state in zip(plan.param_shardings, states, strict=True):
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, wanted, placed))
    return opened, {
        f"{part}.{'.'.join(map(str, path))}": variable[...]
        for part, state in zip(("target", "drafter"), states, strict=True)
        if state is not None
        for path, variable in nnx.to_flat_state(state)
    }


@pytest.fixture(scope="module")
def saved(checkpoint):  # noqa: F811
    """The arrays that the checkpoint was written from."""
    tokenizer = write_tokenizer(checkpoint.parent / "again.json")
    target, drafter = random_params(tokenizer, 0)
    return flatten({"target": target, "drafter": drafter})


@pytest.fixture
def copy(checkpoint, tmp_path):  # noqa: F811
    """A copy to damage."""
    return pathlib.Path(shutil.copytree(checkpoint, tmp_path / "copy"))


def payload(directory) -> pathlib.Path:
    """The file that holds most of the arrays' bytes."""
    files = [p for p in (directory / "params").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("devices", [1, 2])
def test_round_trip_is_exact(checkpoint, saved, devices):  # noqa: F811
    opened, arrays = read(checkpoint, devices)
    assert (opened.config, opened.drafter) == (CONFIG, DRAFTER)
    assert opened.packed
    assert opened.manifest.notes == {"random": True}
    assert arrays.keys() == saved.keys()
    for name, array in arrays.items():
        assert array.dtype == saved[name].dtype
        np.testing.assert_array_equal(np.asarray(array), saved[name], err_msg=name)


def test_the_drafter_can_stay_on_disk(checkpoint, saved):  # noqa: F811
    _, arrays = read(checkpoint, drafter=False)
    assert arrays.keys() == {name for name in saved if name.startswith("target.")}


def test_dense_experts_are_the_packed_ones(checkpoint, saved):  # noqa: F811
    _, arrays = read(checkpoint, 2, packed=False)
    for leaf in ("gate_up", "down"):
        name = f"target.layers.1.ffn.experts.{leaf}"
        expected = dequantize_float64(saved[name], saved[name + "_scale"])
        assert arrays[name].dtype == jnp.float32
        np.testing.assert_array_equal(np.asarray(arrays[name]), expected.astype(np.float32))


def test_more_devices_than_key_value_heads(checkpoint, saved):  # noqa: F811
    """Each device's group holds its query heads, and the key and value head that they share."""
    _, arrays = read(checkpoint, 4)
    full, draft = CONFIG.attention(0), DRAFTER.attention
    name = "target.layers.0.attention.qkv"
    split = arrays[name].shape[1] - full.head_dim - full.v_head_dim
    stored_split = saved[name].shape[1] - full.head_dim - full.v_head_dim
    assert arrays[name].shape == (4, 8 // 4 * 20 + 20 + 12, 96)
    queries = saved[name][:, :stored_split].reshape(8, 20, 96)
    for group in range(4):
        mine = np.asarray(arrays[name][group])
        np.testing.assert_array_equal(mine[:split].reshape(2, 20, 96), queries[2 * group :][:2])
        np.testing.assert_array_equal(mine[split:], saved[name][group // 2, stored_split:])
    name = "drafter.layers.1.attention.kv"
    assert arrays[name].shape == (4, 2 * draft.head_dim, 96)
    for group in range(4):
        np.testing.assert_array_equal(np.asarray(arrays[name][group]), saved[name][group // 2])


def test_dtypes_change_as_asked_but_the_routers_do_not(checkpoint, saved):  # noqa: F811
    _, arrays = read(checkpoint, dtype=jnp.bfloat16)
    assert arrays["target.embedding"].dtype == jnp.bfloat16
    expected = saved["target.embedding"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(arrays["target.embedding"]), expected)
    assert arrays["target.layers.1.ffn.router.weight"].dtype == jnp.float32
    assert arrays["target.layers.1.ffn.experts.down"].dtype == jnp.uint8


def test_reading_in_small_batches_is_the_same(checkpoint, saved, monkeypatch):  # noqa: F811
    monkeypatch.setattr(store, "BATCH_BYTES", 50_000)
    _, arrays = read(checkpoint)
    for name, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(array), saved[name], err_msg=name)


def test_a_saved_bfloat16_and_dense_model_comes_back(tmp_path, rng):
    target, _ = random_params(write_tokenizer(tmp_path / "t.json"), int(rng.integers(1000)))
    flat = flatten(target)
    for name in [n for n in flat if n.endswith("_scale")]:
        codes = name.removesuffix("_scale")
        flat[codes] = dequantize_float64(flat[codes], flat.pop(name)).astype(np.float32)
    flat = {n: v if ".router." in n else v.astype(jnp.bfloat16) for n, v in flat.items()}
    store.save(tmp_path / "dense", CONFIG, nest(flat))
    opened, arrays = read(tmp_path / "dense", packed=False, dtype=jnp.bfloat16)
    assert not opened.packed and opened.drafter is None
    for name, value in flat.items():
        np.testing.assert_array_equal(np.asarray(arrays[f"target.{name}"]), value)
    with pytest.raises(MimoError, match=r"stored without .*tokenizer|saved without a tokenizer"):
        _ = opened.tokenizer


def test_a_flipped_weight_is_named(copy, monkeypatch):
    """Whatever the file format lets through, the hash sees one bit of one array."""
    finish, name = store._finish_reading, "target.layers.1.attention.qkv"

    def flipped(pending):
        array = finish(pending)
        if array.shape == (4, 2 * 28 + 28 + 24, 96):
            array = array.copy()
            array.view(np.uint8).reshape(-1)[5] ^= 1
        return array

    monkeypatch.setattr(store, "_finish_reading", flipped)
    with pytest.raises(MimoError, match=rf"{name} .* is damaged"):
        read(copy)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_truncated_parameters(copy, share, capfd):
    """As in checkpoints of earlier versions, whose manifest has no sizes: the array is named."""
    forget_blobs(copy)
    path = payload(copy)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(MimoError, match="(target|drafter)\\..*etch the checkpoint again") as caught:
        read(copy)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    for raw in ("tensorstore", "zarr", "Traceback", "orbax"):
        assert raw not in (str(caught.value) + "".join(capfd.readouterr())).lower()


def forget_blobs(directory):
    """Makes the manifest one of an earlier version."""
    dataclasses.replace(store.Manifest.read(directory), blobs={}).write(directory)


@pytest.mark.parametrize("earlier", [False, True])
def test_each_deleted_file(copy, earlier):
    """Each is missed; without sizes in the manifest, each that reading needs."""
    if earlier:
        forget_blobs(copy)
    missed, files = [], sorted(p for p in copy.rglob("*") if p.is_file())
    for path in files:
        data = path.read_bytes()
        path.unlink()
        try:
            read(copy)
        except MimoError as error:
            missed.append(path)
            assert "again" in str(error)
        path.write_bytes(data)
    small = {"config.json", "drafter.json", "tokenizer.json", "manifest.json"}
    assert small | {payload(copy).name} <= {path.name for path in missed}
    assert earlier or missed == files
    shutil.rmtree(copy / "params")
    match = "target.*files are missing" if earlier else "params/.* is missing"
    with pytest.raises(MimoError, match=match):
        read(copy)


def test_orbax_reads_it(checkpoint, saved):  # noqa: F811
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), nest(saved))
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore((checkpoint / "params").absolute(), restore_args=kinds)
    for name, value in flatten(tree).items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda m: m["notes"].update(random=False), "changed after it was written"),
        (lambda m: m["arrays"].pop("target.embedding"), "changed after it was written"),
        (lambda m: m.update(format=3), "format 3; .* reads .1, 2."),
        (lambda m: m.pop("hash"), "changed after it was written"),
    ],
)
def test_an_edited_manifest(copy, edit, match):
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(MimoError, match=match):
        store.open_checkpoint(copy)


def rewrite_manifest(directory, edit):
    """Edits the manifest and gives it a hash that fits again, as a careful forger would."""
    manifest = store.Manifest.read(directory)
    arrays = dict(manifest.arrays)
    edit(arrays)
    dataclasses.replace(manifest, arrays=arrays).write(directory)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("shape", (312, 97), r"embedding has shape \(312, 97\); the configuration needs"),
        (
            "dtype",
            "bfloat16",
            "embedding has dtype float32 on disk, but the manifest says bfloat16",
        ),
        ("dtype", "uint8", "embedding has dtype uint8; allowed are float32, bfloat16"),
        ("hash", "0" * 32, r"embedding \(312, 96\) is damaged"),
    ],
)
def test_a_manifest_that_lies(copy, field, value, match):
    name = "target.embedding"

    def edit(arrays):
        arrays[name] = dataclasses.replace(arrays[name], **{field: value})

    rewrite_manifest(copy, edit)
    with pytest.raises(MimoError, match=match):
        read(copy)


def test_a_manifest_that_lacks_an_array(copy):
    rewrite_manifest(copy, lambda arrays: arrays.pop("target.norm.weight"))
    with pytest.raises(MimoError, match=r"missing \['target.norm.weight'\]"):
        store.open_checkpoint(copy)


@pytest.mark.parametrize("name", ["config.json", "drafter.json", "tokenizer.json"])
def test_an_edited_small_file(copy, name):
    path = copy / name
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(MimoError, match=f"{name} was changed after"):
        store.open_checkpoint(copy)


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(MimoError, match="is not a directory: give the directory of a checkpoint"):
        store.open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(MimoError, match="has no manifest.json"):
        store.open_checkpoint(tmp_path)


def test_saving_needs_fitting_parameters(tmp_path, saved):
    target = {n.removeprefix("target."): v for n, v in saved.items() if n.startswith("target.")}
    cut = target | {"head": target["head"][:-1]}
    with pytest.raises(MimoError, match=r"target.head has shape \(311, 96\)"):
        store.save(tmp_path / "a", CONFIG, nest(cut))
    router = "layers.1.ffn.router.weight"
    half = target | {router: target[router].astype(jnp.bfloat16)}
    with pytest.raises(MimoError, match=f"{router} has dtype bfloat16; allowed are float32"):
        store.save(tmp_path / "a", CONFIG, nest(half))
    scale = "layers.1.ffn.experts.down_scale"
    bad = target | {scale: np.full_like(target[scale], 255)}
    with pytest.raises(MimoError, match="experts.down: the block at"):
        store.save(tmp_path / "a", CONFIG, nest(bad))
    with pytest.raises(MimoError, match="both drafter_config and drafter_params"):
        store.save(tmp_path / "a", CONFIG, nest(target), DRAFTER)
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_is_replaced_only_when_asked(copy, saved):
    """Whole: what the one before said on conversations is not said of the new one."""
    target = nest({n[7:]: v for n, v in saved.items() if n.startswith("target.")})
    (copy / "README.md").write_text("stays")
    (copy / "generation_config.json").write_text('{"temperature": 1.9}')
    with pytest.raises(MimoError, match="holds a checkpoint already"):
        store.save(copy, CONFIG, target)
    store.save(copy, CONFIG, target, tokenizer=copy / "tokenizer.json", overwrite=True)
    opened, _ = read(copy)
    assert opened.drafter is None and not (copy / "drafter.json").exists()
    assert not (copy / "generation_config.json").exists()
    assert (copy / "README.md").read_text() == "stays"


def test_what_is_said_on_conversations_goes_along(tmp_path, saved):
    target = nest({n[7:]: v for n, v in saved.items() if n.startswith("target.")})
    source, new = tmp_path / "source", tmp_path / "new"
    source.mkdir()
    (source / "chat_template.jinja").write_text("{{ messages }}")
    store.save(new, CONFIG, target, carried=source)
    store.open_checkpoint(new)
    (new / "chat_template.jinja").write_text("{{ messages[0] }}")
    with pytest.raises(MimoError, match=r"chat_template.jinja was changed after"):
        store.open_checkpoint(new)


def test_interrupted_saving_is_no_checkpoint(tmp_path, copy, saved, monkeypatch):
    """Where there is nothing, or when the old one is being replaced."""
    target = nest({n[7:]: v for n, v in saved.items() if n.startswith("target.")})
    monkeypatch.setattr(store.Manifest, "write", lambda *_: 1 / 0)
    for folder in (tmp_path / "new", copy):
        with pytest.raises(ZeroDivisionError):
            store.save(folder, CONFIG, target, overwrite=True)
        with pytest.raises(MimoError, match="saving was interrupted"):
            store.open_checkpoint(folder)


@pytest.mark.parametrize("fails", ["write_tree", "settle"])
def test_a_disk_without_room_leaves_the_old_one(fails, copy, saved, monkeypatch):
    target = nest({n[7:]: v for n, v in saved.items() if n.startswith("target.")})
    _, before = read(copy)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, fails, full)
        with pytest.raises(OSError, match="No space"):
            store.save(copy, CONFIG, target, overwrite=True)
    _, after = read(copy)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    store.save(copy, CONFIG, target, overwrite=True)
    store.open_checkpoint(copy)
