"""One Orbax tree of arrays: chunks are parts of devices' slices; read array by array."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from mimo_jax.checkpoint.flat import nest

CHUNK_BYTES = 1 << 28
"""The most that a chunk holds: what writing or reading it needs of memory besides the array."""

TEMPORARY = "*.orbax-checkpoint-tmp*"
"""What Orbax calls a tree that is not complete."""


def write_tree(
    folder: Path,
    arrays: dict[str, Any],
    apart: frozenset[str] = frozenset(),
    *,
    compress: bool = True,
) -> None:
    """Saves arrays with Orbax; the folder appears when all of it is written.

    Args:
      folder: to be made.
      arrays: by dotted name. A chunk on disk never crosses from one device's slice to another's.
      apart: names of arrays of which each leading index gets chunks of its own.
      compress: with zstd, which saves next to nothing of trained weights, and takes time.
    """
    import orbax.checkpoint as ocp

    options = {
        name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if name in apart else ())
        for name in arrays
    }
    with _silence(), ocp.PyTreeCheckpointer(use_compression=compress) as checkpointer:
        checkpointer.save(folder.absolute(), nest(arrays), save_args=nest(options))
    # Orbax writes the folder's absolute path into it; that it is there is all that counts.
    marker = folder / "commit_success.txt"
    if marker.exists():
        marker.write_text("committed\n")


def open_array(folder: Path, name: str) -> Any:
    """Opens one array of a tree through TensorStore, as Orbax does; a future of a TensorStore.

    Orbax's own restore fails as a whole, without a name, and leaves callbacks behind that print
    tracebacks; it also wants an event loop of its own inside notebooks.
    """
    base = f"{folder.absolute().as_uri()}/"
    store = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True)


def differing(folder: Path, arrays: dict[str, jax.Array]) -> Iterator[tuple[str, int, bool]]:
    """Reads a tree back and compares it with the arrays in memory, slice by slice.

    Yields:
      the name, the number of bytes compared, and whether they differ.
    """
    for name, array in arrays.items():
        stored = open_array(folder, name).result()
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                wanted = np.asarray(shard.data)
                found = (
                    stored[shard.index].read().result() if shard.index else stored.read().result()
                )
                same = (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
                yield (
                    name,
                    wanted.nbytes,
                    not same or not np.array_equal(_bytes(found), _bytes(wanted)),
                )


def settle(folder: Path) -> None:
    """Waits until a folder's files are on the disk, and drops them from the system's cache.

    After it a tree survives a power failure, and reading it back reads the disk.
    """
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            if path.is_file() and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array, as the widest integers that fit, which compare fastest."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat.view(np.uint64) if flat.size % 8 == 0 else flat


@contextmanager
def _silence() -> Iterator[None]:
    """Orbax keeps its remarks to itself."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
