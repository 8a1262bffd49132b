"""A run's checkpoints: whole training states by step, written by Orbax while training goes on.

A folder `00001200` appears in one rename when all of it is on disk, so that a kill at any moment
leaves whole steps and, at most, a half one under a name that is never read.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from mimo_jax.checkpoint.tree import silence
from mimo_jax.errors import MimoError

FOLDER = "steps"
_DIGITS = 8


class Steps:
    """The checkpoints in a run's folder.

    Args:
      run: the run's folder; `steps` in it is made when first saved to.
      keep: checkpoints to keep; older ones go once a newer one is whole.
    """

    def __init__(self, run: str | Path, keep: int = 2):
        self.folder = Path(run).absolute() / FOLDER
        self.keep = keep
        self._writer: Any = None
        self._pending: int | None = None

    def committed(self) -> list[int]:
        """Steps that are whole on disk, ascending."""
        names = [path.name for path in self.folder.glob("*")] if self.folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdecimal() and len(name) == _DIGITS)

    @property
    def newest(self) -> int | None:
        """The newest whole step, or None."""
        steps = self.committed()
        return steps[-1] if steps else None

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Begins to write a state; returns when it may be changed, before it is on disk.

        Args:
          step: its number.
          state: a tree of arrays.
          position: of the data, JSON.

        Raises:
          MimoError: if this or the save before it failed: no space, no permission.
        """
        import orbax.checkpoint as ocp

        self.wait()
        leaves = named_leaves(state)
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeSave(leaves), position=ocp.args.JsonSave(position)
        )
        self._pending = step
        with self._reported():
            self._make_room(sum(leaf.nbytes for leaf in leaves.values()))
            if self._writer is None:
                self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            with silence():
                self._writer.save(self._path(step), args=arguments)

    def wait(self) -> None:
        """Returns when what was begun is on disk; then older steps go.

        Raises:
          MimoError: if it could not be written.
        """
        if self._pending is None:
            return
        with self._reported():
            with silence():
                self._writer.wait_until_finished()
            self._remove(self.committed()[: -self.keep])
        self._pending = None

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a step.

        Args:
          abstract: the state's tree of shapes, dtypes and shardings; these may be of another
            number of devices than it was saved from.
          step: the newest by default.

        Returns:
          the state, and the position of the data.

        Raises:
          MimoError: if there is none, or it is not a state of this tree.
        """
        import orbax.checkpoint as ocp

        step = self.newest if step is None else step
        if step is None or step not in self.committed():
            raise MimoError(f"{self.folder} holds no checkpoint{f' of step {step}' * bool(step)}.")
        wanted = named_leaves(abstract)
        how = {
            name: ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
            )
            for name, leaf in wanted.items()
        }
        arguments = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(wanted, restore_args=how), position=ocp.args.JsonRestore()
        )
        _hush_callbacks()
        try:
            with silence(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                found = reader.restore(self._path(step), args=arguments)
        except Exception as error:  # Whatever TensorStore and Orbax raise for a damaged folder.
            raise MimoError(
                f"{self._path(step)} cannot be read as a state of this run ({_first_line(error)}). "
                "If it is damaged, remove it: the one before it is used then."
            ) from None
        leaves = [found.state[name] for name in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), dict(found.position)

    def close(self) -> None:
        """Ends the writer's threads; what is being written is finished first."""
        if self._writer is not None:
            with silence(), contextlib.suppress(Exception):
                self._writer.close()
            self._writer = None

    def clean(self) -> None:
        """Removes what a killed run left half written or half removed."""
        for path in self.folder.glob("*") if self.folder.is_dir() else ():
            if not (path.name.isdecimal() and len(path.name) == _DIGITS):
                shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:0{_DIGITS}d}"

    def _make_room(self, nbytes: int) -> None:
        """Raises an OSError at once where nothing can be written, or not so many bytes.

        Orbax's threads would wait for each other for minutes.
        """
        probe = self.folder / "probe"
        probe.mkdir(parents=True, exist_ok=True)
        probe.rmdir()
        free = shutil.disk_usage(self.folder).free
        if free < nbytes:
            raise OSError(f"it takes {nbytes / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free")

    def _remove(self, steps: list[int]) -> None:
        for step in steps:
            # Under another name first: a kill in between must not leave half of a step.
            doomed = self.folder / f"removed-{step}"
            os.replace(self._path(step), doomed)
            shutil.rmtree(doomed)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turns a failure into the one error, after what was half written has gone."""
        _hush_callbacks()
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise ValueError, OSError and others.
            step, self._pending = self._pending, None
            self.close()
            self.clean()
            newest = self.newest
            kept = "there is none before it" if newest is None else f"step {newest} is whole there"
            raise MimoError(
                f"The checkpoint of step {step} could not be written to {self.folder}: "
                f"{_reason(error)}; {kept}. Make room or choose a folder that can be written, and "
                "run the same command again: it goes on from there."
            ) from None


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of any tree by their place in it, such as "params.layers.0.attention.qkv"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {f"{index:05d}.{path_name(path)}": leaf for index, (path, leaf) in enumerate(flat)}
    return named


def path_name(path: tuple) -> str:
    """A path of jax.tree_util as dotted text; variables' own ".value" is left out."""
    names = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    ]
    return ".".join(name for name in names if name != "value")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _reason(error: Exception) -> str:
    """What went wrong, without TensorStore's repetitions."""
    words = _first_line(error)
    for known in ("No space left on device", "Read-only file system", "Permission denied"):
        if known.lower() in str(error).lower():
            return known
    return words


def _hush_callbacks() -> None:
    """Keeps callbacks of what failed from printing tracebacks when they come too late.

    TensorStore's threads call back into an event loop that Orbax has closed by then.
    """
    before = sys.unraisablehook
    if getattr(before, "hushed", False):
        return

    def hook(what: Any) -> None:
        if str(what.exc_value) != "Event loop is closed":
            before(what)

    hook.hushed = True
    sys.unraisablehook = hook
