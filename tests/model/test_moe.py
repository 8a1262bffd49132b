"""Router and experts against loops in numpy float64; both layouts of experts on a mesh agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_model
from jax.sharding import PartitionSpec
from oracles.random_weights import MARGIN
from tolerances import assert_close

from mimo_jax.model.layers import RMSNorm
from mimo_jax.model.moe import ROUTER_WORD, MoE, Router
from mimo_jax.sharding import AXIS, RULES, Parallel, make_mesh, param_specs
from pallas_kernels.expert_ffn import ExpertWeights, expert_ffn
from pallas_kernels.expert_ffn.layout import BARRIER_WORDS, CLAIM, DONE, MEET

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def decode_slowly(codes, scales):
    """MXFP4 [.., K/2] and [.., K/32] to float64 [.., K]."""
    out = np.zeros((*codes.shape[:-1], 2 * codes.shape[-1]))
    for index in np.ndindex(codes.shape):
        for half, nibble in enumerate((codes[index] & 15, codes[index] >> 4)):
            column = 2 * index[-1] + half
            value = E2M1[nibble & 7] * (-1.0 if nibble & 8 else 1.0)
            out[(*index[:-1], column)] = value * 2.0 ** (
                int(scales[(*index[:-1], column // 32)]) - 127
            )
    return out


def experts_slowly(x, gate_up, down, ids, routing):
    out = np.zeros(x.shape)
    for token, choice in np.ndindex(ids.shape):
        expert = ids[token, choice]
        if 0 <= expert < len(down):
            gate, up = gate_up[expert] @ x[token]
            hidden = gate / (1 + np.exp(-gate)) * up
            out[token] += routing[token, choice] * (down[expert] @ hidden)
    return out


def draw(rng, t, d, f, e, c):
    ids = np.stack([rng.permutation(e)[:c] for _ in range(t)]).astype(np.int32)
    ids[rng.random((t, c)) < 0.2] = rng.choice([-1, -7, e, e + 5])
    return (
        rng.standard_normal((t, d)),
        rng.standard_normal((e, 2, f, d)) / np.sqrt(d),
        rng.standard_normal((e, d, f)) / np.sqrt(f),
        ids,
        rng.random((t, c)),
    )


@pytest.mark.parametrize(("t", "d", "f", "e", "c"), [(1, 9, 5, 3, 2), (7, 12, 10, 6, 4)])
def test_dense_experts(t, d, f, e, c, rng):
    x, gate_up, down, ids, routing = draw(rng, t, d, f, e, c)
    weights = ExpertWeights(jnp.asarray(gate_up, jnp.float32), jnp.asarray(down, jnp.float32))
    out = expert_ffn(
        jnp.asarray(x, jnp.float32), weights, jnp.asarray(ids), jnp.asarray(routing, jnp.float32)
    )
    assert_close(out, experts_slowly(x, gate_up, down, ids, routing), "float32")


def test_packed_experts(rng):
    t, d, f, e, c = 5, 64, 32, 4, 3
    x, _, _, ids, routing = draw(rng, t, d, f, e, c)
    codes = [rng.integers(0, 256, s, np.uint8) for s in ((e, 2, f, d // 2), (e, d, f // 2))]
    scales = [rng.integers(120, 127, s, np.uint8) for s in ((e, 2, f, d // 32), (e, d, f // 32))]
    weights = ExpertWeights(*map(jnp.asarray, codes + scales))
    out = expert_ffn(
        jnp.asarray(x, jnp.float32), weights, jnp.asarray(ids), jnp.asarray(routing, jnp.float32)
    )
    dense = [decode_slowly(*pair) for pair in zip(codes, scales, strict=True)]
    assert_close(out, experts_slowly(x, *dense, ids, routing), "float32")


def test_all_choices_dead(rng):
    x, gate_up, down, ids, routing = draw(rng, 3, 8, 5, 4, 2)
    weights = ExpertWeights(jnp.asarray(gate_up, jnp.float32), jnp.asarray(down, jnp.float32))
    out = expert_ffn(
        jnp.asarray(x, jnp.float32),
        weights,
        jnp.full_like(ids, -1),
        jnp.asarray(routing, jnp.float32),
    )
    assert not np.asarray(out).any()


def make_router(rng, **changes) -> Router:
    config = tiny_model(rng, 1, n_routed_experts=9, num_experts_per_tok=4, **changes)
    router = Router(config, nnx.Rngs(0))
    router.weight[...] = jnp.asarray(rng.standard_normal(router.weight.shape), jnp.float32)
    router.bias[...] = jnp.asarray(rng.standard_normal(9), jnp.float32)
    return router


def scores_slowly(router: Router, x) -> np.ndarray:
    """Sigmoid scores of rows x in float64."""
    return 1 / (1 + np.exp(-np.float64(x) @ np.asarray(router.weight[...], np.float64).T))


@pytest.mark.parametrize("normalise", [True, False])
def test_router(normalise, rng):
    router = make_router(rng, norm_topk_prob=normalise, routed_scaling_factor=1.7)
    bias = np.asarray(router.bias[...], np.float64)
    margin = 0.0
    while margin < MARGIN:  # Draws whose order rounding could change are no test.
        x = rng.standard_normal((20, router.weight.shape[1])).astype(np.float32)
        scores = scores_slowly(router, x)
        margin = np.diff(np.sort(scores + bias, axis=1)).min()
    ids, weights = router(jnp.asarray(x))
    order = np.argsort(-(scores + bias), axis=1, kind="stable")[:, :4]
    np.testing.assert_array_equal(ids, order)
    chosen = np.take_along_axis(scores, order, axis=1)
    if normalise:
        chosen = chosen / chosen.sum(axis=1, keepdims=True)
    assert_close(weights, 1.7 * chosen, "float32")


def test_router_ties_go_to_the_lowest_id(rng):
    router = make_router(rng)
    router.weight[...] = jnp.zeros_like(router.weight[...])
    router.bias[...] = jnp.asarray([0, 1, 0, 1, 0, 0, 2, 0, 0], jnp.float32)
    ids, _ = router(jnp.ones((1, router.weight.shape[1]), jnp.float32))
    assert ids.tolist() == [[6, 1, 3, 0]]


def test_router_computes_in_float32_on_bfloat16_activations(rng):
    router = make_router(rng)
    x = jnp.asarray(rng.standard_normal((6, router.weight.shape[1])), jnp.bfloat16)
    _, narrow = router(x)
    _, wide = router(x.astype(jnp.float32))
    assert narrow.dtype == jnp.float32
    np.testing.assert_array_equal(narrow, wide)


def draw_without_close_calls(rng, router: Router, shape) -> jax.Array:
    """Activations whose choices of experts rounding cannot change."""
    while True:
        x = rng.standard_normal(shape).astype(np.float32)
        ranked = np.sort(scores_slowly(router, x.reshape(-1, shape[-1])), axis=1)
        if (ranked[:, -router.choices] - ranked[:, -router.choices - 1]).min() > MARGIN:
            return jnp.asarray(x)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "mxfp4"])
@pytest.mark.parametrize("devices", [2, 8])
def test_expert_parallel_equals_tensor_parallel(devices, packed, rng):
    config = tiny_model(
        np.random.default_rng(2),
        devices,
        hidden_size=64,
        moe_intermediate_size=32 * devices,
        n_routed_experts=2 * devices,
        num_experts_per_tok=3,
    )
    seed = int(rng.integers(2**31))
    moe = nnx.jit(lambda: MoE(config, packed, jnp.float32, nnx.Rngs(seed)))()
    graph, state = nnx.split(moe)
    state = jax.tree.map(lambda x: x * 10 if x.dtype == jnp.float32 else x, state)
    x = draw_without_close_calls(rng, nnx.merge(graph, state).router, (2, 5, 64))
    live = jnp.asarray(np.arange(5) < np.array([[5], [3]]))
    outputs = [jax.jit(lambda state: nnx.merge(graph, state)(x, live, Parallel()))(state)]
    for layout in ("tensor", "expert"):

        def run(state, x, live, layout=layout):
            return nnx.merge(graph, state)(x, live, Parallel(AXIS, layout == "expert"))

        sharded = jax.shard_map(
            run,
            mesh=make_mesh(devices),
            in_specs=(param_specs(state, RULES[layout]), PartitionSpec(), PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        outputs.append(jax.jit(sharded)(state, x, live))
    assert not np.asarray(outputs[0])[1, 3:].any(), "a dead row reached an expert"
    assert np.abs(np.asarray(outputs[0])[0]).max() > 1e-3
    for output in outputs[1:]:
        assert_close(output, outputs[0], "float32")


@pytest.mark.parametrize("t", [3, 17], ids=["kernel's shape", "too many rows"])
def test_decoded_rows_are_routed_to_the_same_experts_bit_for_bit(t, rng):
    """On a CPU: the path that GPUs replace by a kernel is the one that it was."""
    config = tiny_model(
        rng, 1, hidden_size=128, moe_intermediate_size=64, n_routed_experts=9, num_experts_per_tok=4
    )
    moe = MoE(config, True, jnp.bfloat16, nnx.Rngs(int(rng.integers(2**31))))
    moe.experts.pack()
    norm = RMSNorm(128, 1e-5, jnp.bfloat16, nnx.Rngs(0))
    norm.weight[...] = jnp.asarray(rng.standard_normal(128), jnp.bfloat16)
    h = jnp.asarray(rng.standard_normal((t, 128)), jnp.bfloat16)
    live = jnp.asarray(np.arange(t) < t - 1)
    graph, state = nnx.split((moe, norm))

    @jax.jit
    def routed(state, h):
        moe, norm = nnx.merge(graph, state)
        return moe.route(h, norm, live)

    @jax.jit
    def plain(state, h):
        moe, norm = nnx.merge(graph, state)
        x = norm(h)
        ids, weights = moe.router(x)
        return x, jnp.where(live[:, None], ids, -1), weights

    for found, expected in zip(routed(state, h), plain(state, h), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_routers_kernel_counts_in_a_word_that_the_experts_do_not_use():
    assert MEET < ROUTER_WORD < CLAIM < DONE < BARRIER_WORDS


def test_shapes_that_do_not_fit_are_refused(rng):
    x, gate_up, down, ids, routing = draw(rng, 3, 8, 5, 4, 2)
    x, gate_up, down, routing = (jnp.asarray(a, jnp.float32) for a in (x, gate_up, down, routing))
    with pytest.raises(ValueError, match="down has shape"):
        expert_ffn(x, ExpertWeights(gate_up, down[:, :, :4]), jnp.asarray(ids), routing)
    with pytest.raises(ValueError, match="implementation='fast'"):
        expert_ffn(
            x, ExpertWeights(gate_up, down), jnp.asarray(ids), routing, implementation="fast"
        )
