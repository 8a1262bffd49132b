"""Converting a released checkpoint: peak memory and speed at several sizes, beside the disk's own.

Checkpoints of growing depth and equal layers are written in the layout of MiMo-V2.6 from random
bytes. Each is converted by the command in a process of its own, whose peak of resident memory the
system reports. Before it the system's cache is told to forget the files.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mimo_jax.bench.card import environment, print_json, print_table
from mimo_jax.checkpoint.layout import Declared
from mimo_jax.checkpoint.safetensors import INDEX
from mimo_jax.checkpoint.xiaomi import declare
from mimo_jax.config import ModelConfig
from mimo_jax.errors import MimoError
from mimo_jax.presets import preset

POOL_BYTES = 1 << 26
"""Random bytes that all tensors are taken from, each beginning elsewhere."""

BLOCK_BYTES = 1 << 24
LARGEST_CODE = 0x7E
TILE = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo bench convert`."""
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[4, 8, 16], help="depths (default 4 8 16)"
    )
    parser.add_argument("--hidden", type=int, default=2048, help="hidden_size (default 2048)")
    parser.add_argument("--experts", type=int, default=128, help="of a layer (default 128)")
    parser.add_argument("--devices", type=int, default=1, help="chunks for N devices (default 1)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")


def main(options: argparse.Namespace) -> int:
    """Runs the benchmark; the last line on stdout is one JSON object."""
    runs = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="mimo-convert-") as folder:
        for layers in options.layers:
            config = synthetic_config(layers, options.hidden, options.experts)
            source = Path(folder) / "source"
            check_room(Path(folder), config)
            size = write_source(source, config)
            for verify in (True, False):
                run = measure(source, Path(folder) / "new", size, options.devices, verify)
                runs.append({"layers": layers, "source_bytes": size} | run)
                print(*_row(runs[-1]), file=sys.stderr, flush=True)
            shutil.rmtree(source)
    if not options.json:
        columns = ("source", "verified", "peak", "limit", "MB/s", "disk: write", "read", "share")
        print_table("mimo convert", columns, [_row(run) for run in runs])
    print_json({"benchmark": "convert", "runs": runs} | environment())
    return 0


def synthetic_config(layers: int, hidden: int = 2048, experts: int = 128) -> ModelConfig:
    """A model like MiMo-V2.6-Flash with layers of equal size but for the first, which is dense."""
    flash = preset("mimo-v2.6-flash")
    return dataclasses.replace(
        flash,
        vocab_size=32768,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=16,
        hybrid_layer_pattern=(0, *[1] * (layers - 1)),
        moe_layer_freq=(0, *[1] * (layers - 1)),
        intermediate_size=4 * hidden,
        moe_intermediate_size=hidden // 2,
        n_routed_experts=experts,
        num_nextn_predict_layers=0,
    )


def check_room(folder: Path, config: ModelConfig) -> None:
    """Raises a MimoError unless source, result and the disk's own test fit."""
    needed = 3 * sum(tensor.nbytes for tensor in declare(config, None, "v2.6").values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise MimoError(
            f"{folder} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed: choose "
            "another with --folder, or fewer --layers."
        )


def write_source(folder: Path, config: ModelConfig) -> int:
    """Writes a released checkpoint of random weights, a file a layer; returns its bytes."""
    folder.mkdir()
    fields = config.to_dict() | {"quantization_config": {"store_dtype": "mxfp4"}}
    names = ("expert_format", "window_includes_self", "eos_token_ids")
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in fields.items() if k not in names})
    )
    shards: dict[str, dict[str, Declared]] = {}
    for name, tensor in declare(config, None, "v2.6").items():
        parts = name.split(".")
        place = f"layer{parts[2]}" if parts[1] == "layers" else "top"
        shards.setdefault(f"model_{place}.safetensors", {})[name] = tensor
    pools = _pools()
    for file, tensors in shards.items():
        _write_shard(folder / file, tensors, pools)
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    metadata = {"tp_size": config.num_key_value_heads, "save_format": "mxfp4"}
    (folder / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())


def measure(source: Path, new: Path, size: int, devices: int, verify: bool) -> dict[str, Any]:
    """Converts once in a process of its own, and deletes the result.

    Returns:
      peak of resident memory, the largest group's bytes and the limit that they set, bytes a second
      of the source, those of the disk when it writes and when it reads as many bytes one after the
      other, and the share of them that converting reaches.
    """
    disk = _disk_speed(new.with_name("disk"), size)
    forget(source)
    command = [sys.executable, "-m", "mimo_jax", "convert", str(source), str(new)]
    command += ["--json", "--devices", str(devices), *([] if verify else ["--no-verify"])]
    start = time.perf_counter()
    code, usage, peak, errors = _run(command)
    seconds = time.perf_counter() - start
    if code:
        raise MimoError(f"mimo convert ended with {code}: {errors.strip()[-500:]}")
    group = _largest_group(new)
    shutil.rmtree(new)
    together = 1 / (1 / disk["write"] + 1 / disk["read"])
    return {
        "devices": devices,
        "verify": verify,
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": peak,
        "largest_group_bytes": group,
        "peak_limit_bytes": 2 * group + (1 << 30),
        "bytes_per_second": size / seconds,
        "disk_write_bytes_per_second": disk["write"],
        "disk_read_bytes_per_second": disk["read"],
        "share_of_disk": size / seconds / together,
        "load": os.getloadavg()[0],
    }


def _run(command: list[str]) -> tuple[int, Any, int, str]:
    """Exit code, resource usage, peak of resident bytes and stderr of a process."""
    peak = 0
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, _high_water(process.pid))
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        return process.returncode, usage, peak, errors.read().decode()


def _high_water(pid: int) -> int:
    """Peak of a running process's resident bytes so far; of Linux.

    Not usage.ru_maxrss: that begins with what the parent held when it forked.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _row(run: dict[str, Any]) -> tuple[Any, ...]:
    """Gigabytes, and megabytes a second."""
    sizes = [f"{run[name] / 1e9:.2f} GB" for name in ("source_bytes", "peak_bytes")]
    sizes.append(f"{run['peak_limit_bytes'] / 1e9:.2f} GB")
    names = ("bytes_per_second", "disk_write_bytes_per_second", "disk_read_bytes_per_second")
    speeds = [run[name] / 1e6 for name in names]
    return sizes[0], "yes" if run["verify"] else "no", *sizes[1:], *speeds, run["share_of_disk"]


def forget(folder: Path) -> None:
    """Tells the system's cache to forget a folder's files, as far as it listens."""
    for path in (p for p in folder.rglob("*") if p.is_file()):
        with _opened(path, os.O_RDONLY) as handle:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_speed(path: Path, size: int) -> dict[str, float]:
    """Bytes a second of writing a file from end to end, to the disk, and of reading it back."""
    block = np.random.default_rng(0).bytes(BLOCK_BYTES)
    count = -(-size // BLOCK_BYTES)
    start = time.perf_counter()
    with _opened(path, os.O_CREAT | os.O_WRONLY) as handle:
        for _ in range(count):
            os.write(handle, block)
        os.fsync(handle)
        write = time.perf_counter() - start
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    with _opened(path, os.O_RDONLY) as handle:
        while os.read(handle, BLOCK_BYTES):
            pass
    read = time.perf_counter() - start
    path.unlink()
    return {"write": count * BLOCK_BYTES / write, "read": count * BLOCK_BYTES / read}


def _largest_group(new: Path) -> int:
    from mimo_jax.checkpoint.manifest import Manifest, group_of

    sizes: dict[str, int] = {}
    for name, entry in Manifest.read(new).arrays.items():
        sizes[group_of(name)] = sizes.get(group_of(name), 0) + entry.nbytes
    return max(sizes.values())


def _pools() -> dict[str, Callable[[Declared, str], np.ndarray]]:
    """Random bytes for each kind of tensor, such that a reader's checks pass."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, POOL_BYTES, dtype=np.uint8)
    # No NaNs among FP8's codes; exponents of MXFP4's scales near 1; weights near 0.02.
    codes = np.where(raw & 0x7F == 0x7F, raw ^ 1, raw)
    scales = (raw & 15) + np.uint8(112)
    plain = (rng.standard_normal(POOL_BYTES // 4, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    tiles = rng.uniform(1e-5, 1e-3, POOL_BYTES // 16).astype(np.float32)

    def take(pool: np.ndarray, tensor: Declared, name: str) -> np.ndarray:
        flat = pool.view(np.uint8)
        if tensor.nbytes > flat.size:
            return np.resize(flat, tensor.nbytes)
        start = hash_of(name) % (flat.size - tensor.nbytes + 1) // 64 * 64
        return flat[start : start + tensor.nbytes]

    def fp8(tensor: Declared, name: str) -> np.ndarray:
        matrix = take(codes, tensor, name).reshape(tensor.shape).copy()
        # Each tile reaches the largest code, wherever tiles begin: by this a reader knows its rows.
        matrix[::64, ::64] = LARGEST_CODE
        return matrix

    return {
        "F8_E4M3": fp8,
        "U8": lambda t, n: take(scales if n.endswith("_scale") else raw, t, n),
        "BF16": lambda t, n: take(plain, t, n),
        "F32": lambda t, n: take(tiles, t, n),
    }


def hash_of(name: str) -> int:
    """A number that is the same for a name in every process."""
    return sum(value * 31**place for place, value in enumerate(name.encode())) % (1 << 31)


def _write_shard(path: Path, tensors: dict[str, Declared], pools: dict[str, Any]) -> None:
    header, at = {}, 0
    for name, tensor in tensors.items():
        offsets = [at, at + tensor.nbytes]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        at = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            file.write(pools[tensor.dtype](tensor, name).data)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags, 0o600)
    try:
        yield handle
    finally:
        os.close(handle)
