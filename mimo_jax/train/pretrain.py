"""Training the target on packed tokens, in bfloat16 with float32 masters, with or without MXFP4."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int32

from mimo_jax.model.mimo import MiMo, head_logits
from mimo_jax.model.moe import MoE
from mimo_jax.quant.mxfp4 import fake_quantize
from mimo_jax.sharding import Parallel
from mimo_jax.train.experts import Load, grouped_moe

EXPERTS = ("gate_up", "down")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Float32 masters, the optimiser's state and the step."""

    params: nnx.State
    optimizer: optax.OptState
    step: Int32[Array, ""]


def is_expert(path) -> bool:
    """Whether a parameter's path leads to an expert's matrix, which MXFP4 stores."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    return "experts" in names and any(name in EXPERTS for name in names)


def compute_params(params: nnx.State, rule: str | None) -> nnx.State:
    """The weights that the forward pass uses: bfloat16, but for the router, which stays float32.

    With a rule for the shared exponent, experts are as MXFP4 keeps them; with None, as they are.
    """

    def cast(path, value):
        names = {str(getattr(key, "key", getattr(key, "name", key))) for key in path}
        if "router" in names:
            return value
        if rule is not None and is_expert(path):
            value = fake_quantize(value, rule)
        return value.astype(jnp.bfloat16)

    return jax.tree_util.tree_map_with_path(cast, params)


def run_sequences(
    model: MiMo, tokens: Int32[Array, "b t"], factor: float
) -> tuple[Array, list[Array], list[Load]]:
    """Whole sequences: the residual stream, its value after each layer, and the routers' loads."""
    h = model.embedding[...][tokens]
    outputs, loads = [], []

    def feed_forward(ffn, x):
        if not isinstance(ffn, MoE):
            return ffn(x, Parallel())
        mixed, load = grouped_moe(ffn, x, factor)
        loads.append(load)
        return mixed

    for layer in model.layers:
        h = layer.sequence(h, feed_forward)
        outputs.append(h)
    return h, outputs, loads


def token_losses(model: MiMo, h: Float[Array, "b t d"], tokens: Int32[Array, "b t"]):
    """Cross-entropy in nats of tokens 1 to t-1 given those before them, [b, t-1]."""
    logits = head_logits(model.norm(h[:, :-1]), model.head[...])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def make_step(graph, optimizer: optax.GradientTransformation, rule: str | None, balance: float):
    """The jitted `step(state, tokens) -> (state, metrics)`; the state is donated.

    `rule` makes the training MXFP4-aware. `balance` is how far a router's bias moves a step, up for
    experts with less than the mean load and down for those with more (DeepSeek-V3, section 2.1.2);
    no gradient reaches it.
    """

    def loss_fn(params, tokens):
        model = nnx.merge(graph, compute_params(params, rule))
        h, _, loads = run_sequences(model, tokens, factor=1.5)
        return token_losses(model, h, tokens).mean(), loads

    def step(state: TrainState, tokens):
        (loss, loads), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params, tokens)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params = _balance(params, loads, balance)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(gradient),
            "dropped": jnp.stack([load.dropped for load in loads]).mean(),
            "busiest": jnp.stack([_busiest(load) for load in loads]).max(),
        }
        return TrainState(params, optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def _busiest(load: Load) -> Float[Array, ""]:
    """The busiest expert's choices over the mean."""
    chosen = load.chosen.astype(jnp.float32)
    return chosen.max() / chosen.mean()


def _balance(params: nnx.State, loads: list[Load], rate: float) -> nnx.State:
    """Moves the routers' biases; `loads` are those of the sparse layers, in order."""
    remaining = iter(loads)

    def move(path, value):
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        if "router" not in names or "bias" not in names:
            return value
        chosen = next(remaining).chosen.astype(jnp.float32)
        return value + rate * jnp.sign(chosen.mean() - chosen)

    return jax.tree_util.tree_map_with_path(move, params)


def init_train_state(config, seed: int, optimizer) -> tuple[nnx.GraphDef, TrainState]:
    """Random float32 masters with dense experts, on the default device."""

    def build():
        return MiMo(config, nnx.Rngs(seed), packed=False, dtype=jnp.float32)

    graph, _ = nnx.split(nnx.eval_shape(build))

    @jax.jit
    def init():
        params = nnx.state(build())
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    return graph, init()


def make_evaluate(graph, rule: str | None) -> Callable:
    """`evaluate(params, tokens) -> bits per token` over rows [n, t] of held-out tokens."""

    @jax.jit
    def total(params, tokens):
        model = nnx.merge(graph, compute_params(params, rule))
        # No choice is dropped: what is measured must not depend on the other rows of a batch.
        h, _, _ = run_sequences(model, tokens, factor=math.inf)
        return token_losses(model, h, tokens).sum()

    def evaluate(params, tokens: np.ndarray, rows: int = 16) -> float:
        rows = min(rows, len(tokens))
        used = len(tokens) // rows * rows
        nats = sum(float(total(params, tokens[i : i + rows])) for i in range(0, used, rows))
        return nats / (used * (tokens.shape[1] - 1)) / math.log(2)

    return evaluate


def train(
    step: Callable, state: TrainState, batches: Iterator[np.ndarray], steps: int, log: Callable
) -> TrainState:
    """Runs `steps` steps, prefetching one batch; `log(step, metrics)` gets every 50th.

    Raises:
      RuntimeError: when the loss is not finite, with the step.
    """
    start, seen = time.perf_counter(), 0
    for index in range(steps):
        tokens = next(batches)
        seen += tokens.size
        state, metrics = step(state, tokens)
        if index % 50 == 49 or index == steps - 1:
            metrics = {name: float(value) for name, value in metrics.items()}
            if not np.isfinite(metrics["loss"]):
                raise RuntimeError(f"the loss is {metrics['loss']} at step {int(state.step)}")
            metrics["tokens_per_second"] = seen / (time.perf_counter() - start)
            log(int(state.step), metrics)
    return state
