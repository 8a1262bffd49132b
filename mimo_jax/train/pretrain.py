"""Training the target on packed tokens: float32 masters, low-precision compute, MXFP4 or not."""

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from mimo_jax.model.mimo import MiMo, head_logits
from mimo_jax.model.moe import MoE
from mimo_jax.quant.mxfp4 import fake_quantize
from mimo_jax.sharding import Leaf, Parallel
from mimo_jax.train.experts import Load, grouped_moe
from mimo_jax.train.steps import path_name

EXPERTS = ("gate_up", "down")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Float32 masters, the optimiser's state and the step."""

    params: nnx.State
    optimizer: optax.OptState
    step: Leaf  # int32 []


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a step computes.

    Attributes:
      rule: how MXFP4's shared exponents are chosen; None trains without the rounding.
      dtype: of the forward and backward pass; masters are float32.
      balance: how far a router's bias moves a step, up for experts with less than the mean load and
        down for those with more (DeepSeek-V3, section 2.1.2); no gradient reaches it.
      capacity: places of an expert, times the mean load.
      accumulate: parts that a batch is taken in.
      remat: compute layers again in the backward pass.
      chunk: positions of a row whose logits exist at once; 0 is all.
      attention: implementation of `attend_sequence`.
    """

    rule: str | None = None
    dtype: jnp.dtype = jnp.dtype(jnp.bfloat16)
    balance: float = 1e-3
    capacity: float = 1.5
    accumulate: int = 1
    remat: bool = False
    chunk: int = 0
    attention: str = "blocks"


def is_expert(path) -> bool:
    """Whether a parameter's path leads to an expert's matrix, which MXFP4 stores."""
    names = path_name(path).split(".")
    return "experts" in names and names[-1] in EXPERTS


def compute_params(params: nnx.State, rule: str | None, dtype=jnp.bfloat16) -> nnx.State:
    """The weights that the forward pass uses: in `dtype`, but for the router, which stays float32.

    With a rule for the shared exponent, experts are as MXFP4 keeps them; with None, as they are.
    """

    def cast(path, value):
        if "router" in path_name(path).split("."):
            return value
        if rule is not None and is_expert(path):
            value = fake_quantize(value, rule)
        return value.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def run_sequences(
    model: MiMo,
    tokens: Int32[Array, "b t"],
    factor: float,
    remat: bool = False,
    attention: str = "blocks",
) -> tuple[Array, list[Array], list[Load]]:
    """Whole sequences: the residual stream, its value after each layer, and the routers' loads."""
    h = lookup(model.embedding[...], tokens)
    outputs, loads = [], []

    def through(layer, h):
        found = []

        def feed_forward(ffn, x):
            if not isinstance(ffn, MoE):
                return ffn(x, Parallel())
            mixed, load = grouped_moe(ffn, x, factor)
            found.append(load)
            return mixed

        return layer.sequence(h, feed_forward, attention), found

    for layer in model.layers:

        def one(h, layer=layer):
            return through(layer, h)

        h, found = jax.checkpoint(one)(h) if remat else one(h)
        loads += found
        outputs.append(h)
    return h, outputs, loads


@jax.custom_vjp
def lookup(table: Float[Array, "w d"], tokens: Int32[Array, "b t"]) -> Float[Array, "b t d"]:
    """Rows of a table. Its gradient is a product, summed in float32 in an order that is fixed.

    Backwards a lookup is a scatter: thousands of tokens would be added to a frequent one's row, one
    after another and rounded each time.
    """
    return table[tokens]


def _lookup_forward(table, tokens):
    return table[tokens], (table, tokens)


def _lookup_backward(saved, gradient):
    table, tokens = saved
    places = (tokens[..., None] == jnp.arange(len(table))).astype(gradient.dtype)
    found = jnp.einsum("btw,btd->wd", places, gradient, preferred_element_type=jnp.float32)
    return found.astype(table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def in_chunks(function: Callable, chunk: int, *arrays: Array):
    """`function` over pieces of the arrays' second axis, joined; each is computed again backwards.

    What it makes on the way, such as logits over a large vocabulary, exists for one piece at a
    time.

    Args:
      function: takes arrays [b, c, ...], gives arrays [b, c, ...].
      chunk: length of a piece; 0 is the whole axis, in which nothing is computed twice.
      *arrays: [b, t, ...].
    """
    b, t = arrays[0].shape[:2]
    if not 0 < chunk < t:
        return function(*arrays)
    pieces = -(-t // chunk)

    def split(x):
        padding = [(0, 0), (0, pieces * chunk - t)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, padding).reshape(b, pieces, chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        return x.swapaxes(0, 1).reshape(b, pieces * chunk, *x.shape[3:])[:, :t]

    inner = jax.checkpoint(lambda parts: function(*parts))
    return jax.tree.map(join, lax.map(inner, tuple(map(split, arrays))))


def cross_entropy(
    logits: Float[Array, "*rows w"], labels: Int32[Array, "*rows"]
) -> Float[Array, "*rows"]:
    """Of labels, in nats. What a label has is summed, not looked up: backwards no scatter."""
    chosen = labels[..., None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)
    right = jnp.where(chosen, logits, 0).sum(axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - right


def token_losses(
    model: MiMo, h: Float[Array, "b t d"], tokens: Int32[Array, "b t"], chunk: int = 0
) -> tuple[Float[Array, "b s"], Bool[Array, "b s"]]:
    """Cross-entropy in nats of tokens 1 to t-1 given those before them; whether each is the top."""
    head = model.head[...]

    def losses(x, labels):
        logits = head_logits(x, head)
        right = jnp.argmax(logits, axis=-1) == labels
        return cross_entropy(logits, labels), right

    return in_chunks(losses, chunk, model.norm(h[:, :-1]), tokens[:, 1:])


def make_step(graph, optimizer: optax.GradientTransformation, recipe: Recipe, **jit) -> Callable:
    """The jitted `step(state, batch) -> (state, metrics)`; the state is donated.

    Args:
      graph: of the target.
      optimizer: of `make_optimizer`.
      recipe: how it computes.
      **jit: options of jax.jit, such as out_shardings.
    """

    def loss_fn(computed, tokens, trained, total):
        model = nnx.merge(graph, computed)
        h, _, loads = run_sequences(model, tokens, recipe.capacity, recipe.remat, recipe.attention)
        nats, _ = token_losses(model, h, tokens, recipe.chunk)
        return (nats * trained[:, 1:]).sum() / total, loads

    def gradients(*arguments):
        value, gradient = jax.value_and_grad(loss_fn, has_aux=True)(*arguments)
        return value, jax.tree.map(lambda g: g.astype(jnp.float32), gradient)

    def step(state: TrainState, batch):
        tokens, trained = batch["tokens"], batch["trained"].astype(jnp.float32)
        total = jnp.maximum(trained[:, 1:].sum(), 1.0)
        # Rounded and cast once for all parts; the masters' gradient is theirs, straight through.
        computed = compute_params(state.params, recipe.rule, recipe.dtype)
        (loss, loads), gradient = accumulate(
            gradients, recipe.accumulate, computed, (tokens, trained), total
        )
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params = _balance(params, loads, recipe.balance)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradient)}
        if loads:
            dropped = jnp.stack([load.dropped for load in loads]).mean() / recipe.accumulate
            metrics["dropped"] = dropped
            metrics["busiest"] = jnp.stack([_busiest(load) for load in loads]).max()
        return TrainState(params, optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0, **jit)


def accumulate(function: Callable, parts: int, params, batch: tuple, *rest):
    """`function(params, *batch, *rest)` over parts of a batch one after another, results added.

    A part takes every parts-th row, so that rows stay on the devices that they are on.
    """
    if parts == 1:
        return function(params, *batch, *rest)

    def split(x):
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    pieces = jax.tree.map(split, batch)
    shapes = jax.eval_shape(function, params, *jax.tree.map(lambda x: x[0], pieces), *rest)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, piece):
        return jax.tree.map(jnp.add, total, function(params, *piece, *rest)), None

    total, _ = lax.scan(add, zeros, pieces)
    return total


def _busiest(load: Load) -> Float[Array, ""]:
    """The busiest expert's choices over the mean."""
    chosen = load.chosen.astype(jnp.float32)
    return chosen.max() / chosen.mean()


def _balance(params: nnx.State, loads: list[Load], rate: float) -> nnx.State:
    """Moves the routers' biases; `loads` are those of the sparse layers, in order."""
    remaining = iter(loads)

    def move(path, value):
        names = path_name(path).split(".")
        if "router" not in names or "bias" not in names:
            return value
        chosen = next(remaining).chosen.astype(jnp.float32)
        return value + rate * jnp.sign(chosen.mean() - chosen)

    return jax.tree_util.tree_map_with_path(move, params)


def abstract_target(config) -> tuple[nnx.GraphDef, nnx.State]:
    """The target's graph and abstract float32 parameters, experts dense."""
    return nnx.split(
        nnx.eval_shape(lambda: MiMo(config, nnx.Rngs(0), packed=False, dtype=jnp.float32))
    )


def init_params(config, seed: int | Leaf) -> nnx.State:
    """Random float32 masters; to be called inside jit, which places them.

    Args:
      config: of the target.
      seed: may be traced: one program then makes the weights of all seeds.
    """
    rngs = nnx.Rngs(jax.random.key(seed))
    return nnx.state(MiMo(config, rngs, packed=False, dtype=jnp.float32))


def start_state(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; to be called inside jit."""
    return TrainState(params, optimizer.init(params), jnp.int32(0))


@lru_cache(maxsize=8)
def make_evaluate(graph, recipe: Recipe) -> Callable:
    """The jitted `evaluate(params, batch) -> {"nats", "right", "tokens"}`, sums over a batch.

    No choice of an expert is dropped: what is measured must not depend on a batch's other rows.
    It is made once for the same arguments: measuring several models compiles one program.
    """

    @jax.jit
    def evaluate(params, batch):
        model = nnx.merge(graph, compute_params(params, recipe.rule, recipe.dtype))
        h, _, _ = run_sequences(model, batch["tokens"], factor=math.inf, attention=recipe.attention)
        nats, right = token_losses(model, h, batch["tokens"], recipe.chunk)
        trained = batch["trained"][:, 1:].astype(jnp.float32)
        return {
            "nats": (nats * trained).sum(),
            "right": (right.astype(jnp.float32) * trained).sum(),
            "tokens": trained.sum(),
        }

    return evaluate


@lru_cache(maxsize=8)
def make_quantization_error(rule: str) -> Callable:
    """The jitted `error(params)`: by expert matrix, ||MXFP4(w) - w|| / ||w||."""

    @jax.jit
    def error(params: nnx.State) -> dict[str, Array]:
        flat, _ = jax.tree_util.tree_flatten_with_path(params)
        return {
            path_name(path): jnp.linalg.norm((fake_quantize(w, rule) - w).ravel())
            / jnp.linalg.norm(w.ravel())
            for path, w in flat
            if is_expert(path)
        }

    return error
