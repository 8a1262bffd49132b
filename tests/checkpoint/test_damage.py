"""A stored checkpoint damaged at random: nothing wrong is ever used, and what is wrong is named."""

import json
import pathlib

import numpy as np
import pytest
from tiny_checkpoint import write_checkpoint

from mimo_jax.checkpoint import store
from mimo_jax.checkpoint.manifest import NAME, SMALL
from mimo_jax.errors import MimoError


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> pathlib.Path:
    """A checkpoint that is damaged and repaired again, many times."""
    return write_checkpoint(tmp_path_factory.mktemp("victim"))


def arrays_of(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays, as `load` has them before it puts any on a device."""
    opened = store.open_checkpoint(directory)
    return store.read(opened, list(opened.manifest.arrays))


def damage(path: pathlib.Path, rng) -> str:
    """Flips a bit, cuts the file, or deletes it; says what was done."""
    data = path.read_bytes()
    how = rng.choice(["flip", "cut", "delete"], p=[0.6, 0.25, 0.15])
    at = int(rng.integers(len(data)))
    if how == "flip":
        flipped = bytes([data[at] ^ (1 << int(rng.integers(8)))])
        path.write_bytes(data[:at] + flipped + data[at + 1 :])
    elif how == "cut":
        path.write_bytes(data[:at])
    else:
        path.unlink()
    return f"{how} at {at} of {len(data)} in {path}"


def assert_seen(victim: pathlib.Path, path: pathlib.Path, what: str, wanted: dict) -> None:
    """Opening or reading fails, in words that name the file or an array that it holds.

    In the midst of a large file there may be bytes that belong to no array, and that nobody reads:
    a flip of one is not seen, and every array is what it was.
    """
    try:
        found = arrays_of(victim)
    except MimoError as error:
        named = [name for name in [path.name, *wanted] if name in str(error)]
        assert named, f"{what}: neither file nor array is named in: {error}"
        assert "again" in str(error) or "nstall" in str(error), f"{what}: no way out in: {error}"
    else:
        assert what.startswith("flip") and path.stat().st_size > SMALL, f"{what} was not seen"
        for name, array in found.items():
            np.testing.assert_array_equal(array, wanted[name], err_msg=f"{what}: {name}")


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_damage_is_seen_and_named(victim, rng, count):
    """Every file is as likely as the others; that of most bytes of arrays gets half of it all."""
    wanted = arrays_of(victim)
    files = sorted(path for path in victim.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    for draw in range(count):
        path = largest if draw % 2 else files[int(rng.integers(len(files)))]
        data = path.read_bytes()
        what = damage(path, rng)
        # A cut that takes the manifest's last line break takes nothing of what it says.
        harmless = path.name == NAME and path.exists() and same_json(path.read_bytes(), data)
        if not harmless:
            assert_seen(victim, path, what, wanted)
        path.write_bytes(data)
    arrays_of(victim)


def same_json(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_flips_of_the_arrays_own_bytes_are_found_by_their_hashes(victim, rng):
    """Without the sizes and hashes of files, as in checkpoints of earlier versions."""
    opened = store.open_checkpoint(victim)
    wanted = arrays_of(victim)
    files = [path for path in (victim / "params").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data, seen = largest.read_bytes(), 0
    for _ in range(30):
        at = int(rng.integers(len(data)))
        flipped = bytes([data[at] ^ (1 << int(rng.integers(8)))])
        largest.write_bytes(data[:at] + flipped + data[at + 1 :])
        try:
            found = store.read(opened, list(wanted))
        except MimoError as error:
            assert any(name in str(error) for name in wanted), error
            seen += 1
        else:
            for name, array in found.items():
                np.testing.assert_array_equal(array, wanted[name], err_msg=name)
    largest.write_bytes(data)
    assert seen > 10  # All but flips between the arrays, of which there are hardly any.
