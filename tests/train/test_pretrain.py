"""Pre-training and MXFP4-aware training: they learn, balance, and end in what was trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimo_jax.checkpoint.flat import flatten, read_parts, unflatten, write_parts
from mimo_jax.errors import MimoError
from mimo_jax.model.mimo import MiMo
from mimo_jax.train import nano
from mimo_jax.train.optimizer import make_optimizer, schedule
from mimo_jax.train.pretrain import (
    TrainState,
    compute_params,
    init_train_state,
    is_expert,
    make_evaluate,
    make_step,
    train,
)
from tests.helpers import tiny_model

STEPS = 40


def learnable(rng, vocabulary):
    """Endless batches of one repeated phrase, entered anywhere."""
    phrase = rng.permutation(vocabulary)[:11].astype(np.int32)
    while True:
        yield phrase[(rng.integers(0, 11, (4, 1)) + np.arange(37)) % 11]


@pytest.fixture(scope="module")
def trained():
    """A tiny model, trained MXFP4-aware, with its log."""
    rng = np.random.default_rng()
    config = tiny_model(rng, 1, hidden_size=64, moe_intermediate_size=32)
    optimizer = make_optimizer(schedule(1e-2, STEPS, 4, 10), 0.1)
    graph, state = init_train_state(config, 0, optimizer)
    step = make_step(graph, optimizer, "mse", balance=1e-2)
    stream, log = learnable(rng, config.vocab_size), []
    state = train(step, state, stream, STEPS, lambda i, metrics: log.append((i, metrics)))
    return config, graph, state, stream, log


def test_it_learns(trained):
    config, graph, state, stream, log = trained
    last, metrics = log[-1]
    assert last == STEPS == int(state.step)
    assert metrics["loss"] < 0.5 * np.log(config.vocab_size)
    bits = make_evaluate(graph, "mse")(state.params, next(stream))
    assert bits < 0.5 * np.log2(config.vocab_size)


def test_packed_experts_are_what_the_forward_pass_used(trained):
    config, graph, state, _, _ = trained
    used = flatten(compute_params(state.params, nano.QAT_RULE))
    packed = nano.pack_experts(state.params)
    _, dense = nano.dequantized_target(config, packed)
    for name, value in flatten(dense).items():
        assert value.dtype == used[name].dtype, name
        assert np.array_equal(value, used[name]), name
    assert any(name.endswith("gate_up_scale") for name in packed)


def test_biases_move_towards_balance_and_get_no_gradient(rng):
    config = tiny_model(rng, 1)
    optimizer = make_optimizer(schedule(0.0, 10, 1, 1), 0.0)
    graph, state = init_train_state(config, 0, optimizer)
    before = {k: v for k, v in flatten(state.params).items() if k.endswith("router.bias")}
    tokens = rng.integers(0, config.vocab_size, (2, 23)).astype(np.int32)
    state, _ = make_step(graph, optimizer, None, balance=0.25)(state, tokens)
    after = flatten(state.params)
    assert before
    for name, bias in before.items():
        moved = after[name] - bias
        assert (
            set(np.unique(moved)) <= {-0.25, 0.0, 0.25} and np.any(moved > 0) and np.any(moved < 0)
        )


def test_only_experts_are_quantized(rng):
    config = tiny_model(rng, 1, hidden_size=64, moe_intermediate_size=32)
    _, params = nnx.split(MiMo(config, nnx.Rngs(0), dtype=jnp.float32, packed=False))
    plain, aware = (compute_params(params, rule) for rule in (None, "floor"))
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    changed = 0
    for (path, _), a, b in zip(paths, jax.tree.leaves(plain), jax.tree.leaves(aware), strict=True):
        same = np.array_equal(a, b)
        assert same != is_expert(path)
        changed += not same
    assert changed == 2 * sum(config.moe_layer_freq)


def test_parts_round_trip(rng, tmp_path):
    config = tiny_model(rng, 1)
    _, params = nnx.split(MiMo(config, nnx.Rngs(0), packed=False))
    arrays = flatten(params)
    write_parts(tmp_path, "target", arrays, limit=5000)
    assert len(list(tmp_path.glob("target-*.npz"))) > 2
    back = read_parts(tmp_path, "target")
    assert back.keys() == arrays.keys()
    assert all(back[k].dtype == v.dtype and np.array_equal(back[k], v) for k, v in arrays.items())
    back.pop("norm.weight")
    with pytest.raises(MimoError, match="norm.weight"):
        unflatten(params, back)
    with pytest.raises(MimoError, match="drafter-0.npz"):
        read_parts(tmp_path, "drafter")


def test_a_loss_that_is_not_finite_stops(rng):
    def step(state, tokens):
        return state, {"loss": jnp.float32(np.nan)}

    state = TrainState(nnx.State({}), (), jnp.int32(7))
    with pytest.raises(RuntimeError, match="step 7"):
        train(step, state, iter([np.zeros((1, 2))] * 50), 50, lambda *_: None)
