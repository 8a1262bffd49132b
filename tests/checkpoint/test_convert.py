"""Conversion: the same bits, whole chunks for each device, gone on with when it was interrupted."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from xiaomi_writer import RELEASES, Writer

from mimo_jax.bench.convert import measure, synthetic_config, write_source
from mimo_jax.checkpoint import convert as module
from mimo_jax.checkpoint import released, store
from mimo_jax.checkpoint.convert import Choices, convert
from mimo_jax.checkpoint.manifest import Manifest, group_of
from mimo_jax.checkpoint.tree import open_array
from mimo_jax.cli import main
from mimo_jax.decode.program import make_plan
from mimo_jax.errors import MimoError
from mimo_jax.quant import mxfp4
from mimo_jax.sharding import make_mesh

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Released checkpoints by layout, written when first asked for, and only read."""
    rng, made = np.random.default_rng(), {}

    def make(layout: str) -> pathlib.Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("source") / layout
            Writer(layout, rng).write(made[layout])
            (made[layout] / "tokenizer.json").write_text("{}")
            (made[layout] / "chat_template.jinja").write_text("{{ messages }}")
            (made[layout] / "generation_config.json").write_text('{"temperature": 1.0}')
        return made[layout]

    return make


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory) -> pathlib.Path:
    """The v2.6 release converted as it is; only read."""
    new = tmp_path_factory.mktemp("converted") / "new"
    convert(sources("v2.6"), new)
    return new


slow = pytest.mark.slow


def arrays_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
    opened = store.open_checkpoint(directory)
    return store.read(opened, list(opened.manifest.arrays))


def assert_same(found: np.ndarray, wanted: np.ndarray, name: str) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), name
    assert found.tobytes() == wanted.tobytes(), name


@pytest.mark.parametrize(
    "layout", ["v2.6", *(pytest.param(n, marks=slow) for n in RELEASES if n != "v2.6")]
)
def test_every_layout_keeps_its_bits(tmp_path, sources, layout):
    """FP8 and MXFP4 codes as stored; what becomes bfloat16 as direct loading makes it."""
    source = sources(layout)
    seen = []
    manifest = convert(source, tmp_path / "new", progress=lambda *done: seen.append(done))
    assembler = released.open_released(source).assembler()
    arrays = arrays_of(tmp_path / "new")
    assert manifest == Manifest.read(tmp_path / "new") and manifest.arrays.keys() == arrays.keys()
    for name, recipe in assembler.table.items():
        if ".experts." in name and RELEASES[layout][2] == ml_dtypes.float8_e4m3fn:
            if not name.endswith("_scale"):
                wanted = assembler.values(name, ml_dtypes.bfloat16)
                assert_same(arrays.pop(name), wanted, name)
        else:
            assert arrays[name].dtype == module.DTYPES[recipe.dtype]
            assert_same(arrays.pop(name), assembler.stored(name), name)
    assert not arrays
    mtp = {"mtp.json"} if any(name.startswith("mtp.") for name in assembler.table) else set()
    small = {"config.json", "drafter.json", "tokenizer.json", "chat_template.jinja"} | mtp
    assert manifest.files.keys() == small | {"generation_config.json"}
    done, total = zip(*seen, strict=True)
    assert list(done) == sorted(done) and done[-1] == total[0] and len(set(total)) == 1
    assert not (tmp_path / "new" / "conversion").exists()


def test_mxfp4_payload_is_the_files_own(converted, sources):
    """Held to the safetensors library: codes and scales of every expert, byte for byte."""
    source, arrays = sources("v2.6"), arrays_of(converted)
    stored = {}
    for path in source.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys() if ".experts." in name}  # noqa: SIM118
    config = store.open_checkpoint(converted).config
    seen = 0
    for layer in range(config.num_hidden_layers):
        for expert in range(config.n_routed_experts if config.moe_layer_freq[layer] else 0):
            theirs = f"model.layers.{layer}.mlp.experts.{expert}."
            ours = f"target.layers.{layer}.ffn.experts."
            for end, ending in (("", ".weight"), ("_scale", ".weight_scale")):
                gate_up, down = (arrays[f"{ours}{n}{end}"][expert] for n in ("gate_up", "down"))
                for part, value in (("gate", gate_up[0]), ("up", gate_up[1]), ("down", down)):
                    assert_same(value, stored.pop(f"{theirs}{part}_proj{ending}"), theirs)
                    seen += 1
    assert seen and not stored


@slow
def test_choices(tmp_path, sources):
    """FP8 experts to MXFP4 by our quantiser, FP8 to bfloat16, MXFP4 to bfloat16."""
    source = sources("v2.5")
    assembler = released.open_released(source).assembler()
    convert(source, tmp_path / "new", Choices(experts="mxfp4", linear="bfloat16"))
    arrays = arrays_of(tmp_path / "new")
    assert store.open_checkpoint(tmp_path / "new").config.expert_format == "mxfp4"
    for name in (n for n in assembler.table if not n.endswith("_scale")):
        if ".experts." in name:
            codes, scales = mxfp4.quantize(jax.numpy.asarray(assembler.values(name, np.float32)))
            assert_same(arrays.pop(name), np.asarray(codes), name)
            assert_same(arrays.pop(name + "_scale"), np.asarray(scales), name)
        elif name + "_scale" in assembler.table:
            assert_same(arrays.pop(name), assembler.values(name, ml_dtypes.bfloat16), name)
        else:
            assert_same(arrays.pop(name), assembler.stored(name), name)
    assert not arrays
    source = sources("v2.6")
    assembler = released.open_released(source).assembler()
    convert(source, tmp_path / "plain", Choices(experts="bfloat16"))
    name = "target.layers.1.ffn.experts.down"
    wanted = assembler.values(name, ml_dtypes.bfloat16)
    assert_same(arrays_of(tmp_path / "plain")[name], wanted, name)


@pytest.mark.parametrize(
    ("devices", "layout"),
    [(2, "tensor"), pytest.param(4, "tensor", marks=slow), pytest.param(2, "expert", marks=slow)],
)
def test_devices_read_whole_chunks_and_get_what_direct_loading_gives(
    tmp_path, sources, devices, layout
):
    """Eleven experts cannot be divided by two: they stay whole, and so does their chunk."""
    source = sources("v2.6")
    with pytest.MonkeyPatch.context() as patch:
        # Chunks of many megabytes would leave these small arrays whole.
        patch.setattr("mimo_jax.checkpoint.tree.CHUNK_BYTES", 4096)
        convert(source, tmp_path / "new", Choices(devices=devices, layout=layout))
    opened, direct = store.open_checkpoint(tmp_path / "new"), released.open_released(source)
    if layout == "expert":
        assert chunk(opened, "target.layers.1.ffn.experts.down")[0] == 1
        return
    plan = make_plan(
        opened.config,
        opened.drafter,
        make_mesh(devices),
        packed=True,
        fp8=True,
        dtype=jax.numpy.bfloat16,
    )
    ours = store.load(opened, plan.params, plan.param_shardings)
    theirs = released.load(direct, plan.params, plan.param_shardings)
    divided = 0
    for part, mine, other in zip(("target", "drafter"), ours, theirs, strict=True):
        pairs = zip(nnx.to_flat_state(mine), nnx.to_flat_state(other), strict=True)
        for (path, variable), (_, wanted) in pairs:
            name = f"{part}.{'.'.join(map(str, path))}"
            assert_same(np.asarray(variable[...]), np.asarray(wanted[...]), name)
            entry = opened.manifest.arrays[name]
            if entry.shape == variable.shape:
                slices = variable[...].sharding.shard_shape(variable.shape)
                divided += slices != variable.shape
                whole = [s % c == 0 for s, c in zip(slices, chunk(opened, name), strict=True)]
                assert all(whole), f"{name}: chunks {chunk(opened, name)} of slices {slices}"
    assert divided > 10


def chunk(opened: store.Checkpoint, name: str) -> tuple[int, ...]:
    folder = opened.directory / opened.manifest.folder(name)
    return open_array(folder, name).result().chunk_layout.read_chunk.shape


@pytest.fixture
def begun(tmp_path, sources, monkeypatch):
    """A conversion that was stopped in its third group: source, destination, finished groups."""
    source, finished = sources("v2.6"), []
    original = module._Job.convert

    def stop(self, group, *rest):
        if len(finished) == 2:
            (tmp_path / "new" / "params" / f"{group}.orbax-checkpoint-tmp-1").mkdir()
            raise KeyboardInterrupt
        original(self, group, *rest)
        finished.append(group)

    with monkeypatch.context() as patch:
        patch.setattr(module._Job, "convert", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "new")
    return source, tmp_path / "new", finished


def test_an_interrupted_conversion_goes_on(begun, converted, monkeypatch):
    source, new, finished = begun
    with pytest.raises(MimoError, match="has no manifest.json"):
        store.open_checkpoint(new)
    written, said = [], []
    original = module._Job.convert
    monkeypatch.setattr(
        module._Job, "convert", lambda self, g, *r: (written.append(g), original(self, g, *r))
    )
    beside = source / ".DS_Store"
    beside.write_bytes(b"what is not read is free to change")
    try:
        manifest = convert(source, new, say=said.append)
    finally:
        beside.unlink()
    assert not set(written) & set(finished) and any("2 of" in line for line in said)
    assert {*written, *finished} == {group_of(name) for name in manifest.arrays}
    whole = Manifest.read(converted)
    assert manifest.arrays == whole.arrays and manifest.files == whole.files
    assert not list(new.rglob("*tmp*"))
    arrays_of(new)


@slow
def test_a_damaged_group_is_written_again(begun):
    source, new, finished = begun
    largest = max((new / "params" / finished[0]).rglob("*"), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    (new / "conversion" / f"{finished[1]}.json").write_text("{")
    convert(source, new)
    arrays_of(new)


def test_what_cannot_go_on_is_refused(begun, tmp_path):
    source, new, _ = begun
    with pytest.raises(MimoError, match="beginning of another conversion: of other files, or with"):
        convert(source, new, Choices(linear="bfloat16"))
    other = shutil.copytree(source, tmp_path / "source")
    os.utime(other / "config.json")
    with pytest.raises(MimoError, match="beginning of another conversion"):
        convert(other, new)
    with module._begun(new, json.loads((new / "conversion" / "job.json").read_text())):
        with pytest.raises(MimoError, match="is being written by another process"):
            convert(source, new)


@slow
def test_stopped_between_manifest_and_end(tmp_path, sources, monkeypatch):
    source, new = sources("v2.6"), tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(module._Job, "clean", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(source, new)
    before = (new / "manifest.json").read_bytes()
    convert(source, new)
    assert (new / "manifest.json").read_bytes() == before and not (new / "conversion").exists()


def test_places_that_are_refused(tmp_path, sources, monkeypatch):
    source = sources("v2.6")
    with pytest.raises(MimoError, match="is the source itself"):
        convert(source, source / "." / ".." / source.name)
    (tmp_path / "used" / "params").mkdir(parents=True)
    with pytest.raises(MimoError, match="holds a params already, and no conversion"):
        convert(source, tmp_path / "used")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MimoError, match="GB more, but its disk has only 0.0 GB free"):
        convert(source, tmp_path / "full")
    for wrong in ({"experts": "int4"}, {"linear": "fp4"}, {"layout": "x"}, {"devices": 0}):
        with pytest.raises(MimoError, match=f"{next(iter(wrong))}=.* is not allowed"):
            Choices(**wrong)
    with pytest.raises(MimoError, match="devices=99, but JAX has 8 CPU devices"):
        convert(source, tmp_path / "many", Choices(devices=99))


@pytest.mark.parametrize("verify", [True, pytest.param(False, marks=slow)])
def test_a_bit_that_flips_on_the_disk(tmp_path, sources, monkeypatch, verify):
    """Verification sees it at once, and names the array; without it, loading does."""
    source, victim = sources("v2.6"), "target.layers.1"

    def flip(folder):
        if folder.name == victim:
            path = max(folder.rglob("*"), key=lambda p: p.stat().st_size)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)

    monkeypatch.setattr(module, "settle", flip)
    if verify:
        with pytest.raises(MimoError, match=rf"{victim}\..* does not read back from"):
            convert(source, tmp_path / "new")
        assert not (tmp_path / "new" / "manifest.json").exists()
    else:
        convert(source, tmp_path / "new", verify=False)
        with pytest.raises(MimoError, match=rf"{victim}\..* is damaged"):
            arrays_of(tmp_path / "new")


def test_a_disk_that_fails_is_reported(tmp_path, sources, monkeypatch):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tree", fail)
        with pytest.raises(MimoError, match="cannot be written: .*No space left.*what was written"):
            convert(sources("v2.6"), tmp_path / "new")


def test_the_command_does_not_write_over_a_checkpoint(sources, converted, capsys):
    assert main(["convert", str(sources("v2.6")), str(converted)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "mimo: " in err and "manifest.json already" in err


@slow
def test_the_command(tmp_path, sources, capsys):
    arguments = ["convert", str(sources("v2.6")), str(tmp_path / "new")]
    assert main([*arguments, "--devices", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert answer["verified"] and answer["arrays"] == len(arrays_of(tmp_path / "new"))
    assert "Converting" in err and "of other modalities are not read" in err


@slow
def test_memory_is_that_of_the_largest_group(tmp_path):
    """Whatever the depth: three of them, in processes of their own. Speed is for the benchmark."""
    peaks, limits = [], []
    for layers in (2, 4, 8):
        config = synthetic_config(layers, hidden=1024, experts=64)
        size = write_source(tmp_path / "source", config)
        run = measure(tmp_path / "source", tmp_path / "new", size, devices=1, verify=True)
        peaks.append(run["peak_bytes"])
        limits.append(run["peak_limit_bytes"])
        assert run["largest_group_bytes"] < size / 3 or layers == 2
        shutil.rmtree(tmp_path / "source")
    assert len(set(limits)) == 1 and max(peaks) < limits[0]
    assert max(peaks) - min(peaks) < 100e6, f"peaks {peaks} grow with the depth"


@slow
def test_killed_at_ten_random_moments(tmp_path, sources, converted, rng):
    """SIGKILL, and on again: the same hashes as without. A run that ends too early counts not."""
    command = [sys.executable, "-m", "mimo_jax", "convert", str(sources("v2.6"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    kills, rounds, wanted = 0, 0, Manifest.read(converted)
    while kills < 10:
        new = tmp_path / f"new{rounds}"
        rounds += 1
        assert rounds <= 40, f"{kills} kills in {rounds} conversions: they end before they are hit"
        while not (new / "manifest.json").exists():
            process = subprocess.Popen(
                [*command, str(new)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            groups = len(list((new / "conversion").glob("*.json")))
            if kills < 10 and wait_for_more(new, groups, process):
                time.sleep(float(rng.uniform(0, 0.6)))
                process.kill()
            code = process.wait(timeout=240)
            assert code in (0, -signal.SIGKILL)
            kills += code != 0 and not (new / "manifest.json").exists()
        found = store.open_checkpoint(new).manifest
        assert found.arrays == wanted.arrays and found.files == wanted.files
        arrays_of(new)


def wait_for_more(new: pathlib.Path, groups: int, process) -> bool:
    """Until one more group or the job is noted; False if the process ends first."""
    while len(list((new / "conversion").glob("*.json"))) <= groups:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return True
