"""Our checkpoints: an Orbax tree of parameters, and a manifest that its content is held to.

A checkpoint is a directory:

    config.json      the target's ModelConfig
    drafter.json     the drafter's DrafterConfig, if there is a drafter
    mtp.json         the MTPConfig of the target's MTP layers, if there are any
    tokenizer.json   as the `tokenizers` library writes it
    params/          Orbax, OCDBT: {"target": ..., "drafter": ..., "mtp": ...}
    manifest.json    shapes, dtypes and content hashes; written last, so that it marks completeness

Orbax does not see flipped bits (measured: 40 of 40 were restored without an error), hence the
hashes. Arrays are stored as one device has them: as many key/value groups as
there are key/value heads.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.checkpoint.flat import by_name, flatten, of_names
from mimo_jax.checkpoint.manifest import (
    AGAIN,
    CODES,
    FLOATS,
    NAME,
    PARAMS,
    ArrayEntry,
    Manifest,
    describe_blobs,
    hash_bytes,
    write_atomically,
)
from mimo_jax.checkpoint.tree import open_array, settle, write_tree
from mimo_jax.config import SLIDING, AttentionConfig, ModelConfig
from mimo_jax.drafter_config import AnyDrafterConfig, DrafterConfig, MTPConfig
from mimo_jax.errors import MimoError
from mimo_jax.json_files import read_json
from mimo_jax.model.attention import regroup
from mimo_jax.model.drafters import make_drafter
from mimo_jax.model.mimo import MiMo
from mimo_jax.quant import fp8, mxfp4
from mimo_jax.sharding import ShapesOnly

CONFIG, DRAFTER, MTP, TOKENIZER = "config.json", "drafter.json", "mtp.json", "tokenizer.json"
CARRIED = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""What else a model's directory says on its conversations."""
FINISHED = "checkpoint"
"""In the folder of a training run: the checkpoint that it ended with."""

SCALE = "_scale"
BATCH_BYTES = 1 << 28
"""Bytes read at a time: what reading needs of host memory, however large the checkpoint is."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: small files read and checked, no parameter touched yet."""

    directory: Path
    config: ModelConfig
    drafter: DrafterConfig | None
    manifest: Manifest
    mtp: MTPConfig | None = None

    @property
    def tokenizer(self) -> Path:
        """Path of the tokenizer's file.

        Raises:
          MimoError: if the checkpoint was saved without one.
        """
        if TOKENIZER not in self.manifest.files:
            raise MimoError(
                f"{self.directory} was saved without a {TOKENIZER}: text cannot be encoded. Save "
                "it with tokenizer=."
            )
        return self.directory / TOKENIZER

    @property
    def packed(self) -> bool:
        """Whether the experts are stored as MXFP4."""
        return any(name.endswith(f".experts.gate_up{SCALE}") for name in self.manifest.arrays)

    @property
    def fp8(self) -> bool:
        """Whether the target's attention projections and dense MLPs are stored as FP8."""
        return _has_fp8(self.manifest.arrays, "target")

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(entry.nbytes for entry in self.manifest.arrays.values())


def save(
    directory: str | Path,
    config: ModelConfig,
    params: Any,
    drafter_config: DrafterConfig | None = None,
    drafter_params: Any = None,
    *,
    mtp_config: MTPConfig | None = None,
    mtp_params: Any = None,
    tokenizer: str | Path | None = None,
    carried: str | Path | None = None,
    notes: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes a checkpoint; without its manifest, which comes last, it does not count as one.

    One that is replaced stays what it was until the new parameters are on the disk.

    Args:
      directory: to write to; files in it that are of no checkpoint stay.
      config: of the target.
      params: the target's parameters: an nnx.State or nested dicts of arrays, as one device has
        them (MiMo with shards=1). Experts may be MXFP4 or dense.
      drafter_config: of the drafter, or None.
      drafter_params: likewise.
      mtp_config: of the target's MTP layers, or None.
      mtp_params: likewise.
      tokenizer: a tokenizer.json to copy.
      carried: a model's directory, whose chat template and generation_config.json go along.
      notes: remarks for the manifest; JSON.
      overwrite: replace a checkpoint that is there already.

    Raises:
      MimoError: if parameters do not fit their configuration, an MXFP4 value cannot be trusted, or
        there is a checkpoint already.
    """
    directory = Path(directory)
    replaced = (directory / NAME).exists()
    if replaced and not overwrite:
        raise MimoError(
            f"{directory} holds a checkpoint already: pass overwrite=True or choose another."
        )
    pairs = (("drafter", drafter_config, drafter_params), ("mtp", mtp_config, mtp_params))
    for part, shapes, values in pairs:
        if (shapes is None) != (values is None):
            raise MimoError(f"A drafter is saved with both {part}_config and {part}_params.")
    arrays = flatten({"target": params, "drafter": drafter_params or {}, "mtp": mtp_params or {}})
    entries = {name: ArrayEntry.of(array) for name, array in arrays.items()}
    check_entries(entries, config, drafter_config, mtp_config)
    for name in entries:
        if name + SCALE in entries:
            _check_scales(name, arrays)
    files = {CONFIG: to_json(config.to_dict())}
    if drafter_config is not None:
        files[DRAFTER] = to_json(drafter_config.to_dict())
    if mtp_config is not None:
        mtp_config.check_target(config)
        files[MTP] = to_json(mtp_config.to_dict())
    if tokenizer is not None:
        files[TOKENIZER] = Path(tokenizer).read_bytes()
    if carried is not None:
        found = [path for path in (Path(carried) / name for name in CARRIED) if path.is_file()]
        files |= {path.name: path.read_bytes() for path in found}
    directory.mkdir(parents=True, exist_ok=True)
    fresh = directory / f"{PARAMS}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    write_tree(fresh, arrays)
    settle(fresh)
    blobs = describe_blobs(fresh)
    (directory / NAME).unlink(missing_ok=True)
    for name in {DRAFTER, MTP, TOKENIZER, *CARRIED} - files.keys() if replaced else ():
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / PARAMS, ignore_errors=True)
    fresh.rename(directory / PARAMS)
    for name, data in files.items():
        write_atomically(directory / name, data)
    hashes = {name: hash_bytes(data) for name, data in files.items()}
    manifest = Manifest(entries, hashes, notes or {}, blobs)
    manifest.write(directory)
    return manifest


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Reads a checkpoint's small files and checks that its arrays fit its configuration.

    Raises:
      MimoError: if something is missing, was changed, or does not fit; it says what to do.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    manifest.check_files(directory)
    manifest.check_blobs(directory)
    for name, needed in ((CONFIG, True), (DRAFTER, False), (MTP, False)):
        if (needed or (directory / name).exists()) and name not in manifest.files:
            raise MimoError(f"{directory / name} is not listed in the manifest. {AGAIN}")
    config = ModelConfig.from_dict(read_json(directory / CONFIG))
    drafter = mtp = None
    if DRAFTER in manifest.files:
        drafter = DrafterConfig.from_dict(read_json(directory / DRAFTER))
        drafter.check_target(config)
    if MTP in manifest.files:
        mtp = MTPConfig.from_dict(read_json(directory / MTP), config)
    check_entries(manifest.arrays, config, drafter, mtp)
    return Checkpoint(directory, config, drafter, manifest, mtp)


def load(
    checkpoint: Checkpoint,
    params: tuple[nnx.State, nnx.State | None],
    shardings: tuple[Any, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
    parts: tuple[str, str] = ("target", "drafter"),
) -> tuple[nnx.State, nnx.State | None]:
    """Reads parameters onto a mesh, each checked against its hash before anything uses it.

    At most `BATCH_BYTES` (or one array, if it is larger) are in host memory at a time, and what is
    made of one of these arrays: other float dtypes, repeated key/value heads for more devices than
    heads, plain weights out of MXFP4 and FP8, as the abstract parameters ask for.

    Args:
      checkpoint: from `open_checkpoint`.
      params: abstract states of target and drafter, as a `decode.program.Plan` has them; without a
        drafter its arrays are not read.
      shardings: NamedShardings in the same trees.
      progress: called with the bytes read so far and all bytes to read.
      parts: what the names of each state's parameters begin with: "mtp" where those layers draft.

    Returns:
      the states, with arrays.

    Raises:
      MimoError: naming the array that is missing or damaged.
    """
    wanted = by_name(parts, params, shardings)
    # Scales of weights that are decoded here are read, but have no place of their own.
    dense = {name + SCALE for name in wanted if name + SCALE in checkpoint.manifest.arrays}
    names = [n for n in checkpoint.manifest.arrays if n in wanted or n in dense]
    total = sum(checkpoint.manifest.arrays[name].nbytes for name in names)
    placed: dict[str, nnx.Variable] = {}
    done = 0
    for batch in _batches(names, checkpoint.manifest):
        arrays = read(checkpoint, batch)
        for name in batch:
            if name + SCALE in arrays:
                _check_scales(name, arrays)
        for name in (n for n in batch if n in wanted):
            variable, sharding = wanted[name]
            value = _convert(name, arrays, variable, checkpoint)
            placed[name] = variable.replace(jax.device_put(value, sharding))
        done += sum(array.nbytes for array in arrays.values())
        progress(done, total)
    return of_names(parts, params, placed)


def _convert(name: str, arrays, variable, checkpoint: Checkpoint) -> jax.Array | np.ndarray:
    """The stored array as the abstract parameter wants it."""
    value = arrays[name]
    if name + SCALE in arrays and variable.dtype != value.dtype:
        value = decode_weights(name, value, arrays[name + SCALE], variable.dtype, checkpoint)
    if value.shape != variable.shape:
        value = _regroup(name, value, variable.shape[0], checkpoint)
    if value.shape != variable.shape or (value.dtype in CODES) != (variable.dtype in CODES):
        raise MimoError(
            f"{name} is stored as {value.dtype}{list(value.shape)}, which cannot become "
            f"{variable.dtype}{list(variable.shape)}: what is stored dense loads with "
            'experts="dequantized", not "packed", and linear="decoded", not "fp8".'
        )
    return value.astype(variable.dtype, copy=False)


def _regroup(name: str, value: np.ndarray, groups: int, checkpoint: Checkpoint) -> np.ndarray:
    """Repeats key/value heads for a mesh of more devices than there are heads."""
    part, *path, leaf = name.split(".")
    if leaf in ("qkv", "qkv_scale"):
        shapes = _attention(name, checkpoint)
        unit = 1 if leaf == "qkv" else shapes.scale_unit
        sizes = (shapes.head_dim // unit, shapes.v_head_dim // unit)
        return np.asarray(regroup(jnp.asarray(value), groups, *sizes))
    if part == "drafter" and leaf == "kv":
        return np.repeat(value, groups // value.shape[0], axis=0)
    return value


def _attention(name: str, checkpoint: Checkpoint) -> AttentionConfig:
    """Shapes of the attention that a parameter belongs to: the target's, or an MTP layer's."""
    part, _, layer, *_ = name.split(".")
    config = checkpoint.config
    return config.attention(int(layer)) if part == "target" else config.attention_of(SLIDING)


def decode_weights(name: str, codes, scales, dtype, checkpoint: Checkpoint) -> np.ndarray:
    """Values of MXFP4 or FP8 weights, given the codes of that name and their scales."""
    if codes.dtype == np.uint8:
        return mxfp4.dequantize_on_host(codes, scales, np.dtype(dtype))
    fused = name.endswith(".qkv")
    unit = _attention(name, checkpoint).scale_unit if fused else fp8.TILE
    return fp8.decode_on_host(codes, scales, unit, dtype)


def read(checkpoint: Checkpoint, names: list[str]) -> dict[str, np.ndarray]:
    """Arrays on the host, as saved: shape, dtype and hash are checked.

    Raises:
      MimoError: naming the array that is missing or damaged.
    """
    arrays = {}
    opened = {name: open_array(_folder(checkpoint, name), name) for name in names}
    for name, pending in opened.items():
        try:
            arrays[name] = _finish_reading(pending)
        except Exception:  # Whatever TensorStore raises, for files in whatever state.
            raise MimoError(
                f"{name} cannot be read from {_folder(checkpoint, name)}: files are missing, "
                f"cut short or damaged. {AGAIN}"
            ) from None
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        entries = checkpoint.manifest.arrays
        # Taken one after the other: the first damaged array's error is raised.
        list(pool.map(lambda name: entries[name].check(name, arrays[name]), arrays))
    return arrays


def _folder(checkpoint: Checkpoint, name: str) -> Path:
    return checkpoint.directory / checkpoint.manifest.folder(name)


def _finish_reading(pending: Any) -> np.ndarray:
    return pending.result().read().result()


def _batches(names: list[str], manifest: Manifest) -> Iterator[list[str]]:
    """Names in groups of at most BATCH_BYTES, codes together with their scales."""
    batch, size = [], 0
    known = set(names)
    for name in names:
        if name.endswith(SCALE) and name.removesuffix(SCALE) in known:
            continue
        unit = [name, name + SCALE] if name + SCALE in known else [name]
        nbytes = sum(manifest.arrays[n].nbytes for n in unit)
        if batch and size + nbytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch += unit
        size += nbytes
    if batch:
        yield batch


def _check_scales(name: str, arrays: dict[str, np.ndarray]) -> None:
    validate = mxfp4.validate if arrays[name].dtype == np.uint8 else fp8.validate
    error = validate(arrays[name], arrays[name + SCALE], name)
    if error is not None:
        raise error


def check_entries(
    entries: dict[str, ArrayEntry], config: ModelConfig, *drafters: AnyDrafterConfig | None
) -> None:
    """Raises a MimoError unless the arrays are those of the configuration, on one device."""
    packed = any(name.endswith(f".experts.gate_up{SCALE}") for name in entries)
    quantized = _has_fp8(entries, "target")
    expected = {
        f"target.{name}": v
        for name, v in _abstract(lambda r: MiMo(config, r, packed=packed, fp8=quantized))
    }
    for drafter in (d for d in drafters if d is not None):
        more = {"fp8": _has_fp8(entries, drafter.part), "dtype": jnp.bfloat16}
        flat = _abstract(partial(make_drafter, drafter, **more))
        expected |= {f"{drafter.part}.{name}": v for name, v in flat}
    missing, extra = sorted(expected.keys() - entries.keys()), sorted(entries.keys() - expected)
    if missing or extra:
        raise MimoError(
            f"The parameters are not those of the configuration: missing {missing[:4]}, unknown "
            f"{extra[:4]} ({len(missing)} and {len(extra)} in all). Use the configuration that the "
            "parameters were trained with."
        )
    for name, variable in expected.items():
        entry = entries[name]
        if entry.shape != tuple(variable.shape):
            raise MimoError(
                f"{name} has shape {entry.shape}; the configuration needs {variable.shape}. "
                "Use the configuration that they were trained with, and shapes as on one device."
            )
        # A router rounded to another dtype would choose other experts.
        exact = ".router." in name or name.endswith(SCALE) or variable.dtype in CODES
        allowed = (variable.dtype.name,) if exact else FLOATS
        if entry.dtype not in allowed:
            raise MimoError(f"{name} has dtype {entry.dtype}; allowed are {', '.join(allowed)}.")


def _has_fp8(names: Iterable[str], part: str) -> bool:
    """Whether a part of the parameters has FP8 projections."""
    return any(n.startswith(f"{part}.") and n.endswith(f".qkv{SCALE}") for n in names)


def _abstract(build: Callable[[nnx.Rngs], nnx.Module]) -> list[tuple[str, nnx.Variable]]:
    state = nnx.state(nnx.eval_shape(lambda: build(ShapesOnly())))
    return [(".".join(map(str, path)), variable) for path, variable in nnx.to_flat_state(state)]


def to_json(value: dict[str, Any]) -> bytes:
    """A configuration as its file holds it."""
    return (json.dumps(value, indent=1) + "\n").encode()
