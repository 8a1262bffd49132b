"""A run's checkpoints: whole or not there, whatever happens to the disk or to the process."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.errors import MimoError
from mimo_jax.train import steps as module
from mimo_jax.train.metrics import read_metrics
from mimo_jax.train.steps import Steps

ROOT = pathlib.Path(__file__).resolve().parents[2]


def state_of(rng, kilobytes: int = 8):
    return {
        "a": jnp.asarray(rng.standard_normal((kilobytes, 256)), jnp.float32),
        "b": {"c": jnp.asarray(rng.integers(0, 255, 7), jnp.uint8)},
        "d": jnp.asarray(rng.standard_normal(5), jnp.bfloat16),
    }


def abstract_of(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def same(state, other) -> bool:
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def test_states_come_back_and_old_ones_go(tmp_path, rng):
    steps, saved = Steps(tmp_path, keep=2), {}
    assert steps.newest is None
    for number in (3, 10, 200, 1000):
        saved[number] = state_of(rng)
        steps.save(number, saved[number], {"next": number})
    steps.wait()
    assert steps.committed() == [200, 1000]
    for number in (200, 1000):
        state, position = steps.restore(abstract_of(saved[number]), number)
        assert same(state, saved[number]) and position == {"next": number}
    assert same(steps.restore(abstract_of(saved[10]))[0], saved[1000])
    with pytest.raises(MimoError, match="holds no checkpoint of step 10"):
        steps.restore(abstract_of(saved[10]), 10)
    steps.close()


def test_a_state_that_is_changed_while_it_is_written_is_saved_as_it_was(tmp_path, rng):
    grow = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {"a": jnp.asarray(rng.standard_normal((512, 1024)), jnp.float32)}
    before = np.array(state["a"])
    steps = Steps(tmp_path)
    steps.save(1, state, {})
    for _ in range(50):
        state = grow(state)
    jax.block_until_ready(state)
    steps.wait()
    assert np.array_equal(steps.restore(abstract_of(state))[0]["a"], before)
    steps.close()


def test_other_trees_and_damaged_folders_are_refused(tmp_path, rng):
    state = state_of(rng)
    steps = Steps(tmp_path)
    steps.save(1, state, {})
    steps.wait()
    steps.close()
    with pytest.raises(MimoError, match="cannot be read as a state of this run"):
        steps.restore(abstract_of({**state, "e": state["a"]}))
    wider = jax.tree.map(lambda x: jnp.concatenate([x, x]), state)
    with pytest.raises(MimoError, match="cannot be read as a state of this run"):
        steps.restore(abstract_of(wider))
    for path in (tmp_path / "steps/00000001/state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(MimoError, match="cannot be read as a state of this run"):
        steps.restore(abstract_of(state))


def test_half_written_folders_are_never_read_and_go(tmp_path, rng):
    state = state_of(rng)
    steps = Steps(tmp_path)
    steps.save(4, state, {})
    steps.wait()
    for name in ("00000005.orbax-checkpoint-tmp", "removed-2"):
        (tmp_path / "steps" / name).mkdir()
    assert Steps(tmp_path).newest == 4
    Steps(tmp_path).clean()
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["00000004"]
    steps.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB of its own, where that can be had."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def check_refusal(steps, rng, words, before):
    with pytest.raises(MimoError, match=words) as caught:
        steps.save(2, state_of(rng, 1000), {})
        steps.wait()
    assert "step 1 is whole there" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert steps.committed() == [1] and same(steps.restore(abstract_of(before))[0], before)
    assert [path.name for path in steps.folder.iterdir()] == ["00000001"]


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_leaves_the_last_checkpoint_whole(small_disk, rng, monkeypatch, foreseen):
    steps, state = Steps(small_disk), state_of(rng)
    steps.save(1, state, {})
    steps.wait()
    words = "it takes 1.0 MB, and 0.. MB are free"
    (small_disk / "other").write_bytes(bytes(1_300_000))
    if not foreseen:
        words = "No space left on device"
        monkeypatch.setattr(Steps, "_make_room", lambda *_: None)
    check_refusal(steps, rng, words, state)
    (small_disk / "other").unlink()
    steps.save(3, state, {})
    steps.wait()
    assert steps.committed() == [1, 3]
    steps.close()


def test_a_folder_that_cannot_be_written(small_disk, rng):
    steps, state = Steps(small_disk), state_of(rng)
    steps.save(1, state, {})
    steps.wait()
    options = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(options, check=True)
    check_refusal(steps, rng, "Read-only file system", state)
    subprocess.run([*options[:2], "remount,rw", options[3]], check=True)
    steps.close()


def test_a_writer_that_fails_is_one_error(tmp_path, rng, monkeypatch):
    """The same without a file system of its own: what is raised is TensorStore's own."""
    import orbax.checkpoint as ocp

    steps, state = Steps(tmp_path), state_of(rng)
    steps.save(1, state, {})
    steps.wait()

    def fail(*_, **__):
        (tmp_path / "steps/00000002.orbax-checkpoint-tmp").mkdir()
        raise ValueError("RESOURCE_EXHAUSTED: x\n: No space left on device [os_error_code='28']")

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", fail)
    check_refusal(steps, rng, "could not be written to .*: No space left on device", state)
    assert module.path_name(()) == ""


TRAINING = """
import sys
sys.path[:0] = [{tests!r}, {train!r}]
import test_run
from pathlib import Path
test_run.run_fake(Path({out!r}), steps=100000, save_every={every}, log_every=1000)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_50_kills_at_random_moments(tmp_path, rng):
    """Each start goes on from the newest whole step, and a kill costs at most an interval."""
    every, out = 20, tmp_path / "run"
    folders = {"tests": str(ROOT / "tests"), "train": str(ROOT / "tests/train")}
    script = TRAINING.format(**folders, out=str(out), every=every)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    newest, begun, restarts = None, 0, 0
    while begun < 50:
        child = subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE, text=True
        )
        metrics = out / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size > size + 200):
            assert child.poll() is None and time.monotonic() < deadline, child.stderr.read()
            time.sleep(0.01)
            # What a killed run wrote behind its last checkpoint is cut off first.
            size = min(size, metrics.stat().st_size if metrics.exists() else 0)
        time.sleep(float(rng.uniform(0, 1.5)))
        child.send_signal(signal.SIGKILL)
        words = child.communicate()[1]
        begun += 1
        if newest is not None:
            assert f"Going on from step {newest} of" in words
            restarts += 1
        newest = Steps(out).newest
        records = [r["step"] for r in read_metrics(out) if "loss" in r]
        assert records == list(range(1, len(records) + 1))
        assert len(records) - (newest or 0) <= every
    assert restarts >= 45
    print(json.dumps({"kills": begun, "restarts": restarts, "steps": newest}))
