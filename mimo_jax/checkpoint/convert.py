"""Converts a released checkpoint into ours: group by group, verified, resumed where it was killed.

A group is a layer, or one array at the top. Each becomes an Orbax tree of its own, which appears in
one step when it is complete; a record of its hashes follows. A conversion that begins again skips
the groups that have a record. The manifest comes last: with it the checkpoint is complete.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimo_jax.checkpoint.assemble import SCALE
from mimo_jax.checkpoint.layout import DRAFTER_FOLDER, FP8, MASK_EMBEDDING, MXFP4, TILE
from mimo_jax.checkpoint.manifest import (
    NAME,
    PARAMS,
    ArrayEntry,
    Manifest,
    describe_blobs,
    group_of,
    hash_bytes,
    write_atomically,
)
from mimo_jax.checkpoint.released import Released, open_released
from mimo_jax.checkpoint.safetensors import DTYPES, INDEX
from mimo_jax.checkpoint.store import (
    CARRIED,
    CONFIG,
    DRAFTER,
    MTP,
    TOKENIZER,
    check_entries,
    to_json,
)
from mimo_jax.checkpoint.tree import (
    TEMPORARY,
    differing,
    map_large_blocks,
    settle,
    trim,
    write_tree,
)
from mimo_jax.drafter_config import AnyDrafterConfig, MTPConfig
from mimo_jax.errors import MimoError
from mimo_jax.json_files import read_json
from mimo_jax.model.drafters import make_drafter
from mimo_jax.model.mimo import MiMo
from mimo_jax.quant.mxfp4 import BLOCK
from mimo_jax.sharding import RULES, ShapesOnly

STATE, JOB = "conversion", "job.json"
"""Folder in the destination, and file in it, that a conversion is gone on with."""

EXPERTS, LINEAR = ("auto", "mxfp4", "bfloat16"), ("auto", "bfloat16")
PIECE_BYTES = 1 << 23
"""What a thread makes of an array at a time."""

THREADS = min(8, os.cpu_count() or 1)
ALIGNMENT = 64
"""JAX takes arrays as they are, and does not copy them, if they begin at multiples of this."""


Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a conversion makes of a checkpoint.

    Attributes:
      experts: "auto" keeps MXFP4, and makes bfloat16 of FP8; "mxfp4" quantises what is not MXFP4,
        which changes it; "bfloat16" decodes.
      linear: "auto" keeps FP8; "bfloat16" decodes it.
      devices: how many are to read it: chunks on disk are whole parts of each one's slice. Any
        number can read it all the same.
      layout: how these devices divide experts: "tensor" or "expert".
    """

    experts: str = "auto"
    linear: str = "auto"
    devices: int = 1
    layout: str = "tensor"

    def __post_init__(self):
        for name, allowed in (("experts", EXPERTS), ("linear", LINEAR), ("layout", tuple(RULES))):
            if getattr(self, name) not in allowed:
                raise MimoError(
                    f"{name}={getattr(self, name)!r} is not allowed: it must be one of {allowed}."
                )
        if self.devices < 1:
            raise MimoError(f"devices={self.devices} is not allowed: it must be 1 or more.")

    def kind(self, name: str, stored: str) -> str:
        """What becomes of a parameter stored in a dtype: another of safetensors' names."""
        if ".experts." not in name:
            return "BF16" if stored == FP8 and self.linear == "bfloat16" else stored
        if self.experts == "auto":
            return "BF16" if stored == FP8 else stored
        return MXFP4 if self.experts == "mxfp4" else "BF16"


def convert(
    source: str | Path,
    destination: str | Path,
    choices: Choices | None = None,
    *,
    verify: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Converts a released checkpoint, or goes on where an earlier conversion was stopped.

    Of memory it takes the largest group twice, at most, whatever the size of the model.

    Args:
      source: directory as downloaded.
      destination: directory to make.
      choices: by default what is stored stays as it is, but for FP8 experts.
      verify: read each group back from the disk, and compare it with what was written.
      progress: called with the bytes done and all bytes.
      say: told what a user should know, in sentences.

    Raises:
      MimoError: if the source is damaged or of no known layout, the destination holds something
        else or has no room, or what was written does not read back.
    """
    map_large_blocks()
    source, destination = Path(source), Path(destination)
    job = _Job(open_released(source), destination, choices or Choices())
    for note in job.released.notes:
        say(note)
    if destination.resolve() == source.resolve():
        raise MimoError(f"{destination} is the source itself: choose another directory.")
    with _begun(destination, job.identity()):
        if (destination / NAME).exists():
            return job.clean()
        known = {group for group in job.groups if job.record(group) is not None}
        if known:
            say(f"Going on: {len(known)} of {len(job.groups)} groups are there already.")
        job.check_room(known)
        done = 0
        for group, names in job.groups.items():
            if group not in known:
                job.convert(group, verify, lambda n, at=done: progress(at + n, job.nbytes))
            done += sum(job.planned[name].nbytes for name in names)
            progress(done, job.nbytes)
        job.finish()
        return job.clean()


@dataclasses.dataclass(frozen=True)
class _Planned:
    """An array to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Job:
    """One conversion: what is to be written, and what has been."""

    def __init__(self, released: Released, destination: Path, choices: Choices):
        self.released, self.destination, self.choices = released, destination, choices
        self.assembler = released.assembler()
        self.planned = self._plan()
        self.groups: dict[str, list[str]] = {}
        for name in self.planned:
            self.groups.setdefault(group_of(name), []).append(name)
        self.nbytes = sum(planned.nbytes for planned in self.planned.values())
        packed = self._has(f".experts.gate_up{SCALE}")
        formats = {"expert_format": "mxfp4" if packed else "dense"}
        self.config = dataclasses.replace(released.config, **formats)
        layers = self.config.num_nextn_predict_layers
        self.mtp = MTPConfig(self.config, layers) if layers else None
        self._divided = self._divided_axes()
        self._devices = _cpus(choices.devices)
        entries = {n: ArrayEntry(p.shape, p.dtype.name, "") for n, p in self.planned.items()}
        check_entries(entries, self.config, *self._drafters)

    @property
    def _drafters(self) -> list[AnyDrafterConfig]:
        return [config for config in (self.released.drafter, self.mtp) if config is not None]

    def _has(self, end: str, part: str = "") -> bool:
        """Whether there is an array whose name ends and begins so."""
        return any(name.startswith(part) and name.endswith(end) for name in self.planned)

    def _plan(self) -> dict[str, _Planned]:
        """Shapes and dtypes of all arrays to write."""
        table, planned = self.assembler.table, {}
        for name, recipe in table.items():
            base = name.removesuffix(SCALE)
            stored = table[base].dtype if base in table else recipe.dtype
            kind = self.choices.kind(name, stored)
            if base != name and base in table:
                if kind == stored:
                    planned[name] = _Planned(recipe.shape, DTYPES[recipe.dtype])
                continue
            *most, last = recipe.shape
            last *= 2 if stored == MXFP4 else 1
            width = last // 2 if kind == MXFP4 else last
            planned[name] = _Planned((*most, width), DTYPES[kind])
            if kind == MXFP4 and stored != MXFP4:
                planned[name + SCALE] = _Planned((*most, last // BLOCK), np.dtype(np.uint8))
        return planned

    def _divided_axes(self) -> dict[str, int]:
        """The dimension of each array that devices divide, for those that have one."""
        packed = self._has(f".experts.gate_up{SCALE}")
        fp8 = {part: self._has(f".qkv{SCALE}", f"{part}.") for part in ("target", "mtp")}
        states = {"target": lambda r: MiMo(self.config, r, packed=packed, fp8=fp8["target"])}
        for config in self._drafters:
            more = {"fp8": fp8["mtp"], "dtype": jax.numpy.bfloat16}
            states[config.part] = partial(make_drafter, config, **more)
        rules, axes = RULES[self.choices.layout], {}
        for part, build in states.items():
            state = nnx.state(nnx.eval_shape(partial(build, ShapesOnly())))
            for path, variable in nnx.to_flat_state(state):
                logical = variable.get_metadata("logical_axes")
                for axis in (i for i, name in enumerate(logical) if name and rules[name]):
                    axes[f"{part}.{'.'.join(map(str, path))}"] = axis
        return axes

    def identity(self) -> dict[str, Any]:
        """What must be the same for a conversion to go on: source, choices and arrays."""
        opened = [f for f in (self.released.files, self.released.drafter_files) if f is not None]
        tensors = [tensor for files in opened for tensor in files.tensors.values()]
        stored = [(t.name, t.dtype, t.shape, t.path.name, t.offset) for t in tensors]
        # What is read, and nothing that may lie beside it.
        small = (CONFIG, INDEX, TOKENIZER, *CARRIED, DRAFTER_FOLDER + CONFIG, MASK_EMBEDDING)
        paths = {t.path for t in tensors} | {self.released.directory / name for name in small}
        found = [(path, path.stat()) for path in sorted(paths) if path.is_file()]
        stats = [(path.name, stat.st_size, stat.st_mtime_ns) for path, stat in found]
        return {
            "choices": dataclasses.asdict(self.choices),
            "source": hash_bytes(json.dumps([stored, stats]).encode()),
            "arrays": hash_bytes(json.dumps([*map(str, self.planned.items())]).encode()),
        }

    def check_room(self, known: set[str]) -> None:
        """Raises a MimoError unless the disk can hold what is still to be written."""
        names = (n for group, names in self.groups.items() if group not in known for n in names)
        needed = sum(self.planned[name].nbytes for name in names)
        free = shutil.disk_usage(self.destination).free
        if needed > free:
            raise MimoError(
                f"{self.destination} needs {needed / 1e9:.1f} GB more, but its disk has only "
                f"{free / 1e9:.1f} GB free: make room, or choose another disk."
            )

    def record(self, group: str) -> dict[str, Any] | None:
        """What was noted of a group, if all of it is there."""
        try:
            record = read_json(self._state / f"{group}.json")
        except MimoError:
            return None
        folder = self.destination / PARAMS / group
        for name, (size, _) in record["blobs"].items():
            if not (folder / name).is_file() or (folder / name).stat().st_size != size:
                return None
        return record

    def convert(self, group: str, verify: bool, progress: Progress) -> None:
        """Makes, writes and verifies one group, and notes its hashes."""
        folder = self.destination / PARAMS / group
        for remains in (folder, *folder.parent.glob(group + TEMPORARY)):
            shutil.rmtree(remains, ignore_errors=True)
        work = _Work(progress, stages=2 if verify else 1)
        arrays, hashes = {}, {}
        with ThreadPoolExecutor(1) as hasher:
            for unit in self._units(self.groups[group]):
                self.released.check_rows(unit[0])
                made = self._make(unit, work)
                while made:
                    name, value = made.popitem()
                    hashes[name] = hasher.submit(ArrayEntry.of, value)
                    arrays[name] = jax.device_put(value, self._sharding(name))
                    if len(self._devices) > 1:
                        # Each device has a copy of its part: the whole must go before the next.
                        hashes[name].result()
                    del value
            self._write(folder, jax.block_until_ready(arrays))
        entries = {name: dataclasses.asdict(entry.result()) for name, entry in hashes.items()}
        if verify:
            for name, nbytes, differs in differing(folder, arrays):
                if differs:
                    raise MimoError(
                        f"{name} does not read back from {folder} as it was written: the disk or "
                        "the memory is at fault. Convert again, to another disk."
                    )
                work.add(nbytes)
        trim()
        record = {"arrays": entries, "blobs": describe_blobs(folder)}
        write_atomically(self._state / f"{group}.json", json.dumps(record).encode())

    def finish(self) -> None:
        """Writes the small files, and the manifest, which makes the checkpoint complete."""
        arrays, blobs = {}, {}
        for group in self.groups:
            record = self.record(group)
            if record is None:
                raise MimoError(
                    f"{self.destination / PARAMS / group} was changed while others were written: "
                    "convert again; what is whole is kept."
                )
            for name, entry in record["arrays"].items():
                arrays[name] = ArrayEntry(tuple(entry["shape"]), entry["dtype"], entry["hash"])
            blobs |= {f"{group}/{path}": tuple(blob) for path, blob in record["blobs"].items()}
        files = {CONFIG: to_json(self.config.to_dict())}
        if self.released.drafter is not None:
            files[DRAFTER] = to_json(self.released.drafter.to_dict())
        if self.mtp is not None:
            files[MTP] = to_json(self.mtp.to_dict())
        source = self.released.directory
        carried = (name for name in (TOKENIZER, *CARRIED) if (source / name).is_file())
        files |= {name: (source / name).read_bytes() for name in carried}
        for name, data in files.items():
            write_atomically(self.destination / name, data)
        notes = {
            "converted": {
                "layout": dataclasses.asdict(self.released.layout),
                "choices": dataclasses.asdict(self.choices),
                "skipped_tensors": len(self.released.skipped),
            }
        }
        hashes = {name: hash_bytes(data) for name, data in files.items()}
        Manifest(arrays, hashes, notes, blobs, grouped=True).write(self.destination)

    def clean(self) -> Manifest:
        """Removes what only a conversion needs."""
        for path in self._state.glob("*"):
            if path.name != JOB:
                path.unlink()
        # Last: what is interrupted before it can go on.
        shutil.rmtree(self._state, ignore_errors=True)
        return Manifest.read(self.destination)

    @property
    def _state(self) -> Path:
        return self.destination / STATE

    def _units(self, names: list[str]) -> Iterator[list[str]]:
        """Arrays that are made together: codes and scales of what is quantised here."""
        for name in names:
            if name in self.assembler.table:
                scale = name + SCALE
                both = scale in names and scale not in self.assembler.table
                yield [name, scale] if both else [name]

    def _make(self, names: list[str], work: "_Work") -> dict[str, np.ndarray]:
        """Makes arrays piece by piece in threads, and lets the source's pages go."""
        made = {name: _empty(self.planned[name]) for name in names}

        def fill(start: int, stop: int) -> int:
            count = 0
            for name, out in made.items():
                index = (slice(start, stop), *(slice(None),) * (out.ndim - 1))
                out[start:stop] = self.assembler.make(name, out.dtype, index)
                count += out[start:stop].nbytes
            self.released.release(self._tensors(names[0], start, stop))
            return count

        with ThreadPoolExecutor(THREADS) as pool:
            pieces = [pool.submit(fill, *piece) for piece in _pieces(self.planned[names[0]])]
            for piece in as_completed(pieces):
                work.add(piece.result())
        return made

    def _tensors(self, name: str, start: int, stop: int) -> list[str]:
        """Stored tensors that a part of an array was made of, scales among them."""
        found = []
        for recipe in (self.assembler.table.get(name), self.assembler.table.get(name + SCALE)):
            if recipe is not None:
                each = len(recipe.runs) // recipe.shape[0] if recipe.lead else 0
                runs = recipe.runs[start * each : stop * each] if recipe.lead else recipe.runs
                found += [run.tensor for part in runs for run in part]
        return list(dict.fromkeys(found))

    def _sharding(self, name: str) -> NamedSharding:
        """Parts of an array on disk: as many as devices divide it into."""
        axis = self._divided.get(name)
        parts = 1 if axis is None else math.gcd(self.planned[name].shape[axis], len(self._devices))
        mesh = Mesh(np.array(self._devices[:parts]), ("parts",))
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "parts")
        return NamedSharding(mesh, spec)

    def _write(self, folder: Path, arrays: dict[str, jax.Array]) -> None:
        apart = frozenset(name for name in arrays if ".experts." in name)
        try:
            write_tree(folder, arrays, apart, compress=False)
            trim()
            settle(folder)
        except Exception as error:  # Whatever Orbax and TensorStore raise when a disk fails.
            raise MimoError(
                f"{folder} cannot be written: {str(error)[:300]}. Make room or repair the disk, "
                "and convert again: what was written is kept."
            ) from error


class _Work:
    """Counts a group's bytes in each stage of its way, and reports their share."""

    def __init__(self, progress: Progress, stages: int):
        self._progress, self._stages, self._done = progress, stages, 0

    def add(self, nbytes: int) -> None:
        """Counts bytes that passed a stage."""
        self._done += nbytes
        self._progress(self._done // self._stages)


@contextlib.contextmanager
def _begun(destination: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Holds a destination for one conversion, which must be the one that was begun there."""
    state = destination / STATE
    if not (state / JOB).exists():
        for name in (NAME, PARAMS):
            if (destination / name).exists():
                raise MimoError(
                    f"{destination} holds a {name} already, and no conversion that could go on: "
                    "choose another directory, or delete it."
                )
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MimoError(
                f"{destination} is being written by another process: wait until it ends."
            ) from None
        if (state / JOB).exists() and read_json(state / JOB) != identity:
            raise MimoError(
                f"{destination} holds the beginning of another conversion: of other files, or with "
                "other options. Give the same as then to go on, or choose another directory."
            )
        write_atomically(state / JOB, json.dumps(identity).encode())
        yield


def _cpus(count: int) -> list[jax.Device]:
    found = jax.devices("cpu")
    if count > len(found):
        raise MimoError(
            f"devices={count}, but JAX has {len(found)} CPU devices to stand for them: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} before jax starts."
        )
    return found[:count]


def _empty(planned: _Planned) -> np.ndarray:
    """An array to fill, placed where JAX can take it as it is."""
    raw = np.empty(planned.nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + planned.nbytes].view(planned.dtype).reshape(planned.shape)


def _pieces(planned: _Planned) -> list[tuple[int, int]]:
    """Parts of an array's first dimension, of about PIECE_BYTES; rows in whole tiles."""
    size = planned.shape[0]
    step = max(1, PIECE_BYTES * size // max(planned.nbytes, 1))
    if len(planned.shape) <= 2:
        step = -(-step // TILE) * TILE
    return [(start, min(start + step, size)) for start in range(0, size, step)]
