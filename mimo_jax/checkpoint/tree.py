"""One Orbax tree of arrays: chunks are parts of devices' slices; read array by array."""

import ctypes
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

CHUNK_BYTES = 1 << 27
"""The most that a chunk holds: what writing or reading it needs of memory besides the array."""

PIECE_BYTES = 1 << 24
"""What is read back and compared at a time."""

FILE_BYTES = 1 << 28
"""Of a file of chunks, about. A file is kept in memory until it is full."""

MAPPED_BYTES = 1 << 24
"""Blocks of this size and more are given back to the system as soon as they are freed."""

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
    with silence(), ocp.PyTreeCheckpointer(use_compression=compress) as checkpointer:
        checkpointer.save(
            folder.absolute(),
            ocp.args.PyTreeSave(
                nest(arrays), save_args=nest(options), ocdbt_target_data_file_size=FILE_BYTES
            ),
        )
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
    """Reads a tree back and compares it with the arrays in memory, some chunks at a time.

    Yields:
      the name, the number of bytes compared, and whether they differ.
    """
    for name, array in arrays.items():
        stored = open_array(folder, name).result()
        same = (stored.dtype.numpy_dtype, stored.shape) == (array.dtype, array.shape)
        shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        for shard in shards if same else ():
            wanted = np.asarray(shard.data)
            for at in _pieces(wanted, stored.chunk_layout.read_chunk.shape):
                first = shard.index[0].start or 0
                rows = slice(first + at.start, first + at.stop)
                found = stored[(rows, *shard.index[1:])].read().result()
                yield name, found.nbytes, not np.array_equal(_bytes(found), _bytes(wanted[at]))
        if not same:
            yield name, array.nbytes, True


def _pieces(array: np.ndarray, chunk: tuple[int, ...]) -> list[slice]:
    """Slices of the first dimension, of whole chunks and about PIECE_BYTES."""
    step = max(1, PIECE_BYTES // max(array[:1].nbytes * chunk[0], 1)) * chunk[0]
    return [slice(at, min(at + step, len(array))) for at in range(0, len(array), step)]


def map_large_blocks() -> None:
    """Has glibc map each large block by itself from now on, so that freeing it gives it back.

    By default glibc learns from the first large block that is freed to cut those of up to 32 MB
    from its threads' heaps (mallopt(3), M_MMAP_THRESHOLD), where they stay: a conversion of 2
    layers of 67 MB took 590 MB at its peak then, and one of 10 layers 690; with this both take 500.
    """
    threshold = -3  # M_MMAP_THRESHOLD of <malloc.h>.
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(threshold, MAPPED_BYTES)


def trim() -> None:
    """Gives freed memory back to the system, which glibc keeps for the threads that used it."""
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


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
def silence() -> Iterator[None]:
    """Orbax keeps its log, tracebacks of failed writes included, to itself."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
