"""Pre-training and MXFP4-aware training: they learn, balance, and end in what was trained."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from tiny_run import SHAPE, make_config, make_task, write_data

from mimo_jax.checkpoint import store
from mimo_jax.checkpoint.flat import flatten, unflatten
from mimo_jax.config import ModelConfig
from mimo_jax.errors import MimoError
from mimo_jax.model.layers import linear
from mimo_jax.model.mimo import MiMo
from mimo_jax.sharding import make_mesh
from mimo_jax.train.config import OptimizerSection, ScheduleSection
from mimo_jax.train.export import save_target, stored_target, target_arrays
from mimo_jax.train.optimizer import make_optimizer, make_schedule
from mimo_jax.train.pretrain import (
    Recipe,
    abstract_target,
    accumulate,
    compute_params,
    cross_entropy,
    in_chunks,
    init_params,
    is_expert,
    lookup,
    make_evaluate,
    make_step,
    run_sequences,
    start_state,
    token_losses,
)
from mimo_jax.train.steps import Steps
from mimo_jax.train.tasks import train
from tests.helpers import tiny_model
from tests.tolerances import relative_norm

STEPS = 40
RECIPE = Recipe(rule="mse", balance=1e-2)


def learnable(rng, vocabulary):
    """Endless batches of one repeated phrase, entered anywhere."""
    phrase = rng.permutation(vocabulary)[:11].astype(np.int32)
    while True:
        tokens = phrase[(rng.integers(0, 11, (4, 1)) + np.arange(37)) % 11]
        yield {"tokens": tokens, "trained": np.ones(tokens.shape, bool)}


@pytest.fixture(scope="module")
def trained():
    """A tiny model, trained MXFP4-aware with Muon, and its last loss."""
    rng = np.random.default_rng()
    config = tiny_model(rng, 1, hidden_size=64, moe_intermediate_size=32)
    schedule = make_schedule(ScheduleSection(warmup=0.1, decay=0.25), 1e-2, STEPS)
    optimizer = make_optimizer(schedule, OptimizerSection())
    graph, _ = abstract_target(config)
    state = jax.jit(lambda: start_state(init_params(config, 0), optimizer))()
    step, stream = make_step(graph, optimizer, RECIPE), learnable(rng, config.vocab_size)
    for _ in range(STEPS):
        state, metrics = step(state, next(stream))
    return config, graph, state, stream, float(metrics["loss"])


def test_it_learns(trained):
    config, graph, state, stream, loss = trained
    assert int(state.step) == STEPS and loss < 0.5 * np.log(config.vocab_size)
    batch = next(stream)
    batch["trained"][:, ::2] = False
    sums = make_evaluate(graph, RECIPE)(state.params, batch)
    assert float(sums["tokens"]) == batch["trained"][:, 1:].sum()
    assert float(sums["nats"] / sums["tokens"]) < 0.5 * np.log(config.vocab_size)
    assert 0.5 < float(sums["right"] / sums["tokens"]) <= 1


def test_biases_move_towards_balance_and_get_no_gradient(trained):
    _, graph, state, stream, _ = trained
    still = make_optimizer(lambda count: 0.0 * count, OptimizerSection(weight_decay=0.0))
    before = {k: v for k, v in flatten(state.params).items() if k.endswith("router.bias")}
    step = make_step(graph, still, Recipe(balance=0.25))
    after, _ = step(start_state(jax.tree.map(jnp.copy, state.params), still), next(stream))
    after = flatten(after.params)
    assert before
    for name, bias in before.items():
        moved = after[name] - bias
        assert np.allclose(np.abs(moved)[moved != 0], 0.25, atol=1e-5)
        assert np.any(moved > 0) and np.any(moved < 0)


def test_only_experts_are_quantized(rng):
    config = tiny_model(rng, 1, hidden_size=64, moe_intermediate_size=32)
    _, params = nnx.split(MiMo(config, nnx.Rngs(0), dtype=jnp.float32, packed=False))
    compute = jax.jit(compute_params, static_argnums=1)
    plain, aware = (compute(params, rule) for rule in (None, "floor"))
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    changed = 0
    for (path, _), a, b in zip(paths, jax.tree.leaves(plain), jax.tree.leaves(aware), strict=True):
        same = np.array_equal(a, b)
        assert same != is_expert(path)
        changed += not same
    assert changed == 2 * sum(config.moe_layer_freq)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_packed_checkpoint_is_what_the_last_step_computed_with(dtype, tmp_path, rng):
    """MXFP4-aware training from a dense checkpoint, through files, back to the same bits."""
    data = write_data(tmp_path / "data", rng)
    shape = SHAPE | {"num_hidden_layers": 1, "hybrid_layer_pattern": [1], "moe_layer_freq": [1]}
    section = {"steps": 2, "save_every": 1, "dtype": dtype}
    shapes = ModelConfig.from_dict(shape | {"vocab_size": 300})
    arrays = target_arrays(jax.jit(lambda: init_params(shapes, 3))(), None, jnp.dtype(dtype))
    vocabulary = Path(data["tokenizer"])
    begun = save_target(tmp_path / "first", shapes, arrays, vocabulary, {})
    config = make_config(data, tmp_path / "qat", run=section)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, shape={}, start=str(begun))
    )
    task, _ = make_task(config, "qat")
    start = flatten(task.init().params)
    before = store.open_checkpoint(begun)
    assert not before.packed
    for name, value in stored_target(before).items():
        assert np.array_equal(start[name], value.astype(np.float32)), name
    result = train("qat", config)
    state, _ = Steps(config.run.out).restore(task.abstract)
    used = flatten(compute_params(state.params, config.qat.rule, jnp.dtype(dtype)))
    checkpoint = store.open_checkpoint(result.checkpoint)
    assert checkpoint.packed
    model = nnx.eval_shape(
        lambda: MiMo(checkpoint.config, nnx.Rngs(0), packed=False, dtype=jnp.dtype(dtype))
    )
    abstract = nnx.state(model)
    here = NamedSharding(make_mesh(1), PartitionSpec())
    places = jax.tree.map(lambda _: here, abstract)
    dense, _ = store.load(checkpoint, (abstract, None), (places, None))
    for name, value in flatten(dense).items():
        assert value.dtype == used[name].dtype and np.array_equal(value, used[name]), name
    errors = result.evaluation["qat_error"]
    assert len(errors) == 2 and all(0.01 < error < 0.5 for error in errors.values())


def test_losses_in_chunks_are_the_losses(trained, rng):
    config, graph, state, stream, _ = trained
    model = nnx.merge(graph, state.params)
    tokens = jnp.asarray(next(stream)["tokens"])
    h = jnp.asarray(rng.standard_normal((*tokens.shape, config.hidden_size)), jnp.float32)
    rows = np.asarray(model.norm(h)[:, :-1], np.float64) @ np.asarray(model.head[...], np.float64).T
    top = rows.max(-1, keepdims=True)
    labels = np.asarray(tokens)[:, 1:, None]
    nats = np.log(np.exp(rows - top).sum(-1)) + top[..., 0]
    nats -= np.take_along_axis(rows, labels, -1)[..., 0]

    def compute(h, chunk):
        losses, right = token_losses(model, h, tokens, chunk)
        return losses.sum(), (losses, right)

    compute = jax.jit(jax.value_and_grad(compute, has_aux=True), static_argnums=1)
    _, whole = compute(h, 0)
    for chunk in (0, 7, 36):
        (_, (losses, right)), pieces = compute(h, chunk)
        assert relative_norm(pieces, whole) < 1e-5
        assert relative_norm(losses, nats) < 1e-5
        assert np.array_equal(right, rows.argmax(-1) == labels[..., 0])


def test_gradients_that_are_written_by_hand(rng):
    """A lookup, a product and a cross-entropy against what JAX makes of the plain functions."""
    table = jnp.asarray(rng.standard_normal((11, 6)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((13, 6)), jnp.float32)
    tokens, labels = (jnp.asarray(rng.integers(0, n, (3, 7)), jnp.int32) for n in (11, 13))

    def ours(table, head):
        logits = linear(lookup(table, tokens), head, jnp.float32)
        return cross_entropy(logits, labels).sum()

    def plain(table, head):
        logits = table[tokens] @ head.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    found, expected = (
        jax.jit(jax.value_and_grad(function, (0, 1)))(table, head) for function in (ours, plain)
    )
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_norm(mine, theirs) < 1e-5


@pytest.mark.slow
def test_kernels_of_attention_give_the_same_gradients(rng):
    """Through whole layers, of full and of sliding attention."""
    config = ModelConfig.from_dict(SHAPE | {"vocab_size": 300, "max_position_embeddings": 128})
    graph, _ = abstract_target(config)
    params = jax.jit(lambda: init_params(config, 3))()
    params = jax.tree.map(lambda p: 4 * p if p.ndim > 1 else p, params)
    tokens = jnp.asarray(rng.integers(0, 300, (2, 128)), jnp.int32)

    def gradients(attention):
        def loss(params):
            model = nnx.merge(graph, params)
            h, _, _ = run_sequences(model, tokens, math.inf, attention=attention)
            return token_losses(model, h, tokens)[0].mean()

        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    for mine, theirs in zip(gradients("interpreted"), gradients("blocks"), strict=True):
        assert not np.any(theirs) or relative_norm(mine, theirs) < 1e-4


def test_no_product_of_low_precision_is_made_in_float32():
    """Of the whole step's products, only the router's has float32 matrices."""
    config = ModelConfig.from_dict(SHAPE | {"vocab_size": 300})
    graph, params = abstract_target(config)
    optimizer = make_optimizer(lambda count: 1e-3, OptimizerSection(name="adamw"))
    state = jax.eval_shape(lambda p: start_state(p, optimizer), params)
    batch = {
        "tokens": jax.ShapeDtypeStruct((2, 20), jnp.int32),
        "trained": jax.ShapeDtypeStruct((2, 20), bool),
    }
    step = make_step(graph, optimizer, Recipe(dtype=jnp.dtype(jnp.bfloat16)))
    text = step.trace(state, batch).lower().as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    wide = [line for line in products if re.search(r": \(.*xf32.*\) ->", line)]
    assert len(products) > 30
    routers = 3 * sum(config.moe_layer_freq)  # Forwards, and the gradients of both factors.
    assert len(wide) <= routers, wide


def test_chunks_and_parts_are_put_together(rng):
    x = jnp.asarray(rng.standard_normal((6, 11, 3)), jnp.float32)
    assert np.array_equal(in_chunks(lambda x: x.sum(-1), 4, x), x.sum(-1))

    def value(w, x):
        return ((x * w) ** 2).sum(), {"rows": jnp.int32(x.shape[0])}

    function = jax.value_and_grad(value, has_aux=True)
    w = jnp.asarray(rng.standard_normal(3), jnp.float32)
    (loss, aux), gradient = accumulate(function, 3, w, (x,))
    (loss_1, _), gradient_1 = accumulate(function, 1, w, (x,))
    assert int(aux["rows"]) == 6
    assert math.isclose(loss, loss_1, rel_tol=1e-5) and relative_norm(gradient, gradient_1) < 1e-5


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plateau", {0: 0, 5: 0.5, 10: 1, 74: 1, 75: 1, 88: 0.48, 100: 0}),
        ("cosine", {0: 0, 10: 1, 55: 0.5, 100: 0}),
        ("constant", {0: 0, 10: 1, 100: 1}),
    ],
)
def test_schedules(kind, expected):
    section = ScheduleSection(kind=kind, warmup=0.1, decay=0.25)
    schedule = make_schedule(section, 1.0, 100)
    for step, value in expected.items():
        assert abs(float(schedule(step)) - value) < 1e-6, step


def test_adamw_decays_matrices_alone(rng):
    params = {"w": jnp.ones((3, 5)), "norm": jnp.ones(5)}
    section = OptimizerSection(name="adamw", weight_decay=0.5, clip=0.0)
    optimizer = make_optimizer(lambda count: jnp.float32(0.1), section)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    assert np.allclose(updates["w"], -0.05) and not np.any(updates["norm"])


def test_unflatten_names_what_is_wrong(rng):
    _, params = abstract_target(tiny_model(rng, 1))
    arrays = {name: np.zeros(p.shape, p.dtype) for name, p in _named(params).items()}
    assert flatten(unflatten(params, arrays)).keys() == arrays.keys()
    arrays.pop("norm.weight")
    with pytest.raises(MimoError, match="norm.weight"):
        unflatten(params, arrays)


def _named(params):
    return {".".join(map(str, path)): p for path, p in nnx.to_flat_state(params)}
