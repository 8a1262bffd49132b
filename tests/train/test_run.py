"""Runs that stop and go on: bit for bit, on other numbers of devices, after faults."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import assert_same_bits, bits, changed, make_config, make_task, write_data

from mimo_jax.errors import MimoError
from mimo_jax.sharding import make_mesh
from mimo_jax.train import run as loop
from mimo_jax.train.config import from_dict, to_dict
from mimo_jax.train.loader import Loader
from mimo_jax.train.metrics import Guard, Log, read_metrics
from mimo_jax.train.placing import Placing
from mimo_jax.train.run import Task
from mimo_jax.train.sources import Tokens
from mimo_jax.train.steps import Steps, named_leaves
from mimo_jax.train.tasks import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Always the same: other devices add in another order, which could change a close choice."""
    return write_data(tmp_path_factory.mktemp("data"), np.random.default_rng(7))


class Stop(Exception):
    """What interrupts a run here."""


def interrupted_after(loader, count: int, monkeypatch):
    """Makes a loader raise when it was asked for so many batches."""
    given, original = [0], type(loader).__next__

    def give(self):
        given[0] += 1
        if given[0] > count:
            raise Stop
        return original(self)

    monkeypatch.setattr(type(loader), "__next__", give)


def losses(out) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(out) if "loss" in r}


def fake_task(out):
    """A task of one small array, which depends on every batch; nothing of it is compiled twice."""
    ids = np.random.default_rng(3).integers(0, 97, 19 * 11)
    rows = Tokens(ids.astype(np.uint16), np.ones(len(ids), bool)).rows(11)

    def step(state, batch, number):
        w = state["w"] * 0.9 + batch["tokens"].astype(jnp.float32).sum() / 1e3 + number
        loss = 1 + jnp.abs(w).mean() * 1e-3
        return {"w": w}, {"loss": loss, "grad_norm": loss}

    def finish(state):
        (out / "checkpoint").mkdir(parents=True, exist_ok=True)
        return out / "checkpoint"

    start = {"w": jnp.ones((4, 5), jnp.float32)}
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), start)
    return Task(
        kind="target",
        init=lambda: start,
        abstract=abstract,
        step=step,
        loader=Loader([(rows, 4)], seed=1),
        learning_rate=lambda step: 0.1,
        flops=1e6,
        evaluate=None,
        finish=finish,
    )


def run_fake(out, task=None, **section):
    """Runs the fake task; returns the result and the last state."""
    config = from_dict({"run": {"out": str(out), "batch": 4, "peak_tflops": 1, **section}})
    out.mkdir(parents=True, exist_ok=True)
    task = fake_task(out) if task is None else task
    result = loop.run(task, config, Placing(make_mesh(1), 4), np.float32)
    return result, Steps(out).restore(task.abstract)[0]


def final_state(config, kind="target"):
    """The state of a finished run, read back."""
    task, _ = make_task(config, kind)
    return Steps(config.run.out).restore(task.abstract)[0]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run of 77 steps that nothing interrupted, on one device."""
    out = tmp_path_factory.mktemp("whole") / "run"
    config = make_config(data, out, run={"steps": 77, "save_every": 27, "keep": 1})
    train("target", config)
    return config


def interrupted(config):
    """Runs a configuration to its 31st batch, where it is stopped; and then to its end."""
    with pytest.MonkeyPatch.context() as patch:
        task, placing = make_task(config)
        interrupted_after(task.loader, 31, patch)
        with pytest.raises(Stop):
            loop.run(task, config, placing, np.float32)
    assert Steps(config.run.out).newest == 26
    result = train("target", config)
    assert result.step == 77 and 77 - 26 >= 50
    return config


def test_50_steps_after_an_interruption_are_50_uninterrupted_ones(whole, tmp_path):
    config = interrupted(changed(whole, out=str(tmp_path)))
    assert_same_bits(final_state(config), final_state(whole))
    assert losses(config.run.out) == losses(whole.run.out)
    assert sorted(losses(config.run.out)) == list(range(1, 78))


@pytest.mark.slow
def test_50_steps_after_an_interruption_on_8_devices(whole, tmp_path):
    config = changed(whole, devices=8, out=str(tmp_path / "whole"))
    train("target", config)
    parts = interrupted(changed(config, out=str(tmp_path / "parts")))
    assert_same_bits(final_state(parts), final_state(config))
    assert losses(parts.run.out) == losses(config.run.out)


def test_a_state_of_8_devices_is_divided_and_restored_on_4_and_on_1(data, tmp_path):
    config = make_config(data, tmp_path / "run", run={"devices": 8})
    task, placing = make_task(config)
    state = task.init()
    for name, leaf in named_leaves(state).items():
        share = leaf.addressable_shards[0].data.size / leaf.size
        assert share == (1 / 8 if ".experts." in name else 1), name
    batch = placing.batch(next(task.loader))
    assert batch["tokens"].addressable_shards[0].data.shape[0] == 1
    steps = Steps(tmp_path / "run")
    steps.save(3, state, task.loader.position)
    steps.wait()
    for devices in (4, 1):
        other, _ = make_task(changed(config, devices=devices))
        found, position = steps.restore(other.abstract)
        assert_same_bits(found, state)
        assert position == task.loader.position
        assert all(len(leaf.sharding.device_set) == devices for leaf in jax.tree.leaves(found))
    steps.close()
    with pytest.raises(MimoError, match=r"run.batch=8 rows cannot be divided over 3 devices"):
        make_task(changed(config, devices=3))
    with pytest.raises(MimoError, match="8 'experts', which 3 devices cannot divide"):
        make_task(changed(config, devices=3, batch=9, out=str(tmp_path / "b")))


@pytest.mark.slow
def test_a_run_of_8_devices_goes_on_on_4_and_on_1(data, tmp_path):
    section = {"steps": 12, "devices": 8, "dtype": "float32"}
    config = make_config(data, tmp_path / "run", run=section, experts={"capacity": 100.0})
    train("target", config)
    found = {}
    for devices in (8, 4, 1):
        task, placing = make_task(changed(config, devices=devices))
        state, position = Steps(config.run.out).restore(task.abstract)
        held = bits(state)
        task.loader.position = position
        after, metrics = task.step(state, placing.batch(next(task.loader)), 12)
        placed = [leaf.sharding for leaf in jax.tree.leaves(after)]
        assert placed == [leaf.sharding for leaf in jax.tree.leaves(task.abstract)]
        found[devices] = held, float(metrics["loss"])
    for devices in (4, 1):
        state, loss = found[devices]
        assert all(state[k].tobytes() == v.tobytes() for k, v in found[8][0].items())
        assert abs(loss - found[8][1]) <= 1e-6 * abs(found[8][1])


@pytest.mark.slow
def test_accumulating_is_taking_the_batch_at_once(data, tmp_path):
    """Equal to rounding: the same rows, the same loss and gradient, whatever the parts."""
    results = []
    for parts in (1, 4):
        out, section = tmp_path / str(parts), {"accumulate": parts, "steps": 1}
        config = make_config(data, out, run=section, experts={"capacity": 100.0})
        task, placing = make_task(config)
        _, metrics = task.step(task.init(), placing.batch(next(task.loader)), 0)
        results.append({name: float(value) for name, value in metrics.items()})
    for name in ("loss", "grad_norm"):
        assert math.isclose(results[0][name], results[1][name], rel_tol=1e-5), name


def test_a_run_with_other_settings_or_in_a_strange_folder_is_refused(whole, tmp_path):
    values = to_dict(whole)
    other = from_dict(
        values | {"run": {**values["run"], "steps": 78}, "optimizer": {"name": "adamw", "lr": 0.5}}
    )
    with pytest.raises(MimoError, match=r"optimizer.lr: 0.01, now 0.5; run.steps: 77, now 78"):
        train("target", other)
    with pytest.raises(MimoError, match="holds a run of `mimo train target`"):
        train("qat", whole)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(MimoError, match="holds other files"):
        train("target", changed(whole, out=str(tmp_path)))
    with pytest.raises(MimoError, match="cannot be written"):
        train("target", changed(whole, out=str(tmp_path / "notes.txt/run")))
    with pytest.raises(MimoError, match="run.out is empty"):
        train("target", changed(whole, out=""))
    with pytest.raises(MimoError, match="kind='both' is not allowed"):
        train("both", whole)
    # What may change does: the finished run is there already, and its model is written again.
    assert train("target", changed(whole, log_every=5)).step == 77


def test_data_that_changed_are_seen(data, whole, tmp_path, rng):
    """Before a step is taken: the run is copied, the data are not those it was begun with."""
    shutil.copytree(whole.run.out, tmp_path / "run")
    values = to_dict(changed(whole, out=str(tmp_path / "run")))
    np.save(tmp_path / "train.npy", rng.integers(4, 300, 4000))
    path = tmp_path / "run/recipe.toml"
    path.write_text(path.read_text().replace(data["files"][0], str(tmp_path / "train.npy")))
    values["data"]["files"] = [str(tmp_path / "train.npy")]
    with pytest.raises(MimoError, match="have changed since the run began"):
        train("target", from_dict(values))


@pytest.mark.slow
def test_a_fork_goes_on_with_everything(whole, tmp_path):
    """A run that is paused and forked without a change is the run that was not."""
    paused = train("target", changed(whole, out=str(tmp_path / "paused"), stop_at=33))
    assert (paused.step, paused.checkpoint) == (33, None)
    fork = changed(whole, out=str(tmp_path / "fork"), fork=str(tmp_path / "paused"))
    train("target", fork)
    assert_same_bits(final_state(fork), final_state(whole))
    assert sorted(losses(tmp_path / "fork")) == list(range(34, 78))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([(2.0, 1.0)] * 60 + [(math.nan, 1.0)], "Stopped at step 61: the loss is nan"),
        ([(2.0, 1.0)] * 3 + [(2.0, math.inf)], "Stopped at step 4: .*norm inf"),
        ([(2.0, 1.0)] * 50 + [(6.1, 1.0)], "Stopped at step 51: the loss leapt to 6.1"),
    ],
)
def test_what_stops_a_run(values, words):
    guard = Guard(spike=3.0)
    with pytest.raises(MimoError, match=words) as caught:
        for step, (loss, norm) in enumerate(values, 1):
            guard.check(step, loss, norm, lambda: 40)
    assert "the last is of step 40" in str(caught.value) and step == len(values)
    calm = Guard(spike=0.0)
    for loss in [2.0] * 60 + [50.0]:
        calm.check(1, loss, 1.0, lambda: None)


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    task = fake_task(tmp_path)
    true_step = task.step

    def step(state, batch, number):
        state, metrics = true_step(state, batch, number)
        if number == 19:  # Step 20, at which a checkpoint is due.
            metrics = metrics | {"loss": metrics["loss"] * math.nan}
        return state, metrics

    task.step = step
    with pytest.raises(MimoError, match="Stopped at step 20: .* the last is of step 15"):
        run_fake(tmp_path, task, steps=40, save_every=10)
    assert Steps(tmp_path).newest == 15


def test_every_interruption_costs_at_most_an_interval(tmp_path, rng):
    result, expected = run_fake(tmp_path / "whole", steps=60, save_every=7)
    out, task, done = tmp_path / "parts", None, 0
    while done < 60:
        task = fake_task(out)
        more = int(rng.integers(1, 25))
        with pytest.MonkeyPatch.context() as patch:
            interrupted_after(task.loader, more, patch)
            try:
                run_fake(out, task, steps=60, save_every=7)
                done = 60
            except Stop:
                stood = min(done + more, 60)
                done = Steps(out).newest or 0
                assert stood - done <= 7
    assert_same_bits(Steps(out).restore(task.abstract)[0], expected)
    assert losses(out) == losses(tmp_path / "whole") and len(losses(out)) == 60


def test_the_lines_and_records_of_a_run(tmp_path, capsys):
    task = fake_task(tmp_path)
    task.evaluate = lambda state: {"bits_per_byte": 1.5}
    result, _ = run_fake(tmp_path, task, steps=6, eval_every=3, tensorboard=True)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("step")]
    assert [line.split()[1] for line in lines if "loss" in line] == [f"{n}/6" for n in range(1, 7)]
    assert all(words in lines[-2] for words in ("lr", "tokens/s", "% of peak", "left"))
    assert lines[-1] == "step 6 | bits per byte 1.5000"
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert result.evaluation == {"bits_per_byte": 1.5}
    assert list((tmp_path / "tensorboard").iterdir())


def test_records_of_a_killed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(path)] == [1, 2]
    Log(tmp_path, 1).close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    path.write_text('nothing\n{"step": 2}\n')
    with pytest.raises(MimoError, match="line 1 is not JSON"):
        read_metrics(path)
    with pytest.raises(MimoError, match="does not exist"):
        read_metrics(tmp_path / "none")
