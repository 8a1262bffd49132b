"""Some ranks of a divided model alone: their shapes and counts, what is projected, the command."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_request
from jax import lax
from jax.sharding import PartitionSpec

from mimo_jax import cli
from mimo_jax.bench import rank_projection as projection
from mimo_jax.bench import rank_routing as routing
from mimo_jax.bench.hlo import Module, kernels_a_layer
from mimo_jax.bench.rank_profile import Event, split
from mimo_jax.bench.rank_run import Runner, must_read, shorten
from mimo_jax.bench.rank_weights import random_params, random_state
from mimo_jax.decode.kernel_weights import kernel_plan
from mimo_jax.decode.program import Settings, make_plan, make_program, make_state, state_maker
from mimo_jax.decode.rank import rank_plan
from mimo_jax.errors import MimoError
from mimo_jax.planning.groups import EXPERTS
from mimo_jax.planning.report import round_of
from mimo_jax.planning.sizes import abstract_mesh
from mimo_jax.presets import drafter_preset, preset
from mimo_jax.sharding import Parallel, make_mesh
from pallas_kernels.choice import kernel_absence

NANO, DRAFTER = preset("mimo-nano"), drafter_preset("mimo-nano")
BF16 = jnp.bfloat16


def whole_and_rank(ranks: int, config=NANO, drafter=DRAFTER, **options):
    whole = make_plan(config, drafter, abstract_mesh(ranks), dtype=BF16, **options)
    return whole, rank_plan(whole, make_mesh(1))


def settings_of(block: int = 8, max_len: int = 40) -> Settings:
    return Settings(batch=1, max_len=max_len, block=block, chunk=0, dtype=BF16)


# --- the rank -------------------------------------------------------------------------------------


def test_a_rank_of_eight_of_the_large_model_has_an_eighth_of_what_is_divided():
    """By hand: 16 of 128 query heads, one key/value head, an eighth of widths and vocabulary."""
    config, drafter = shorten(preset("mimo-v2.6-pro"), drafter_preset("mimo-v2.6-pro"), 2)
    whole = make_plan(config, drafter, abstract_mesh(8), fp8=True, dtype=BF16)
    plan = rank_plan(kernel_plan(whole), make_mesh(1))
    target, draft = plan.params
    dense, sparse = target["layers"][0], target["layers"][1]
    found = {
        "qkv": dense["attention"]["qkv"].shape,
        "output": sparse["attention"]["output"].shape,
        "sink": sparse["attention"]["sink"].shape,
        "dense": dense["ffn"]["gate_up"].shape,
        "router": sparse["ffn"]["router"]["weight"].shape,
        "head": target["head"].shape,
        "features": draft["features"].shape,
        "drafter": draft["layers"][4]["mlp"]["down"].shape,
    }
    assert found == {
        "qkv": (1, 16 * 192 + 192 + 128, 6144),
        "output": (6144, 16 * 128),
        "sink": (16,),
        "dense": (2, 2048, 6144),
        "router": (384, 6144),
        "head": (19072, 6144),
        "features": (768, 5 * 6144),
        "drafter": (6144, 2048),
    }
    words = [sparse["ffn"]["experts"][name].shape for name in ("gate_up", "down")]
    # 4.25 bits a weight.
    assert [4 * math.prod(shape[1:]) for shape in words] == [
        512 * 6144 * 17 // 32,
        6144 * 256 * 17 // 32,
    ]
    assert drafter.target_layer_ids == (0, 1, 1, 1, 1) and plan.ranks == 8


def test_a_rank_has_the_shapes_of_a_mesh_of_devices():
    ranks, settings = 4, settings_of()
    plan = make_plan(NANO, DRAFTER, make_mesh(ranks), dtype=BF16)
    _, alone = whole_and_rank(ranks)
    assert jax.tree.structure(alone.params) == jax.tree.structure(plan.params)
    leaves = zip(*map(jax.tree.leaves, (plan.params, plan.param_shardings)), strict=True)
    there = [place.shard_shape(leaf.shape) for leaf, place in leaves]
    assert there == [leaf.shape for leaf in jax.tree.leaves(alone.params)]
    whole_state, state = make_state(plan, settings), make_state(alone, settings)
    assert [leaf.addressable_shards[0].data.shape for leaf in jax.tree.leaves(whole_state)] == [
        leaf.shape for leaf in jax.tree.leaves(state)
    ]
    # Of 2 and 4 key/value heads each of 4 devices has one.
    assert {cache.keys.shape[1] for cache in state.caches} == {1}


def test_ranks_need_devices_that_divide_the_plans():
    whole, _ = whole_and_rank(4)
    with pytest.raises(MimoError, match="over 4 devices .* on 3: the number must divide 4"):
        rank_plan(whole, make_mesh(3))


def test_two_ranks_of_four_have_half_of_what_four_have():
    ranks, settings = 4, settings_of()
    plan = make_plan(NANO, DRAFTER, make_mesh(ranks), dtype=BF16)
    two = rank_plan(plan, make_mesh(2))
    assert (two.shards, two.ranks) == (2, 2)

    def shards(plan):
        leaves = zip(*map(jax.tree.leaves, (plan.params, plan.param_shardings)), strict=True)
        state = jax.tree.leaves(make_state(plan, settings))
        return [place.shard_shape(leaf.shape) for leaf, place in leaves] + [
            leaf.addressable_shards[0].data.shape for leaf in state
        ]

    assert shards(two) == shards(plan)
    everyone = rank_plan(plan, make_mesh(ranks))
    assert everyone.ranks == 1 and everyone.params == plan.params


@pytest.mark.parametrize("devices", [1, 2])
def test_absent_ranks_are_stood_in_for(devices, rng):
    x = jnp.asarray(rng.normal(size=(3, 5 * devices)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 7 * 5 * devices, (4,)), jnp.int32)
    parallel = Parallel("model", ranks=7)

    def body(x, ids):
        return parallel.gather(x, 1), parallel.sum(x), parallel.local(ids, 5)

    everywhere, divided = PartitionSpec(), PartitionSpec(None, "model")
    run = jax.shard_map(
        body,
        mesh=make_mesh(devices),
        in_specs=(divided, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )
    gathered, total, local = jax.jit(run)(x, ids)
    np.testing.assert_array_equal(gathered, np.tile(x, (1, 7)))
    np.testing.assert_allclose(total, x.reshape(3, devices, 5).sum(axis=1), rtol=1e-6)
    np.testing.assert_array_equal(local, np.asarray(ids) % 5)


# --- what a round takes ---------------------------------------------------------------------------


def test_collectives_are_counted_in_the_program():
    _, plan = whole_and_rank(4)
    settings = settings_of()
    state = jax.eval_shape(state_maker(plan, settings))
    traced = make_program(plan, settings).trace(plan.params, state, make_request(1, limit=30))
    found = projection.collectives(traced)
    assert found == {
        # The embeddings, and two a layer; the best logits and their tokens.
        "sums": 1 + 2 * NANO.num_hidden_layers,
        "gathers": 2,
        # Likewise, and the features' projection.
        "drafter sums": 1 + 2 * DRAFTER.num_hidden_layers,
        "drafter gathers": 2 + 1,
    }
    sampled = projection.collectives(traced, sampled=True)
    assert sum(sampled.values()) > sum(found.values())
    assert sampled["drafter sums"] == found["drafter sums"]


@pytest.mark.skipif(bool(kernel_absence()), reason=str(kernel_absence()))
def test_exchanges_by_mail_are_counted_once_each():
    """The kernel and the reference of each are in the traced program."""

    def run(x, rounds):
        parallel = Parallel("model").with_mail()

        def one_round(carry):
            left, x = carry
            with jax.named_scope("drafter"):
                x = parallel.sum(parallel.sum(x))
            x = parallel.gather(x, 0)[:3] + parallel.sum(x) + lax.psum(x, "model")
            with jax.named_scope("accept"):
                x = lax.cond(rounds > 3, lambda: parallel.sum(parallel.sum(x)), lambda: x)
            return left - 1, x

        return lax.while_loop(lambda carry: carry[0] > 0, one_round, (rounds, x))[1]

    specs = dict(in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    traced = jax.jit(jax.shard_map(run, mesh=make_mesh(2), **specs)).trace(jnp.ones((3, 128)), 5)
    wanted = {"sums": 2, "gathers": 1, "drafter sums": 2, "drafter gathers": 0}
    assert projection.collectives(traced) == wanted
    # Of the two branches the second one, which is the first of `cond`.
    assert projection.collectives(traced, sampled=True) == wanted | {"sums": 4}


def test_device_time_over_a_rounds_leaves_nothing_between():
    us = {"experts": 40.0, "router": 0.0, "norms, sums, others": 15.0}
    rows = projection.grouped(us, whole_us=60.0)
    assert [name for name, *_ in rows] == ["experts", "norms, sums, others", "between kernels"]
    assert rows[-1][1] == 5.0 and projection.grouped(us, whole_us=50.0)[-1][1] == 0.0


def test_projection_by_hand():
    counts = {"sums": 141, "gathers": 2, "drafter sums": 11, "drafter gathers": 3}
    us = projection.communication_us(counts, sum_us=8.0, gather_us=5.0)
    assert us == 152 * 8 + 5 * 5
    found = projection.project(4.1, us, {"coding": 6.3, "agents": 4.29})
    assert found["round_ms"] == pytest.approx(5.341)
    assert found["tokens_per_second"]["coding"] == pytest.approx(1179.55, abs=0.01)
    assert found["tokens_per_second"]["agents"] == pytest.approx(803.22, abs=0.01)


def test_growth_by_hand():
    rows = [
        {"context": 4000, "ms": 7.0, "bytes": 10_000_000_000},
        {"context": 1000, "ms": 5.0, "bytes": 6_000_000_000},
    ]
    (found,) = projection.growth(rows, read_gbs=4000.0)
    assert found == {"context": 4000, "added_ms": 2.0, "bytes_ms": 1.0, "ratio": 2.0}


def test_bytes_of_a_round_follow_the_experts_that_were_chosen():
    whole, _ = whole_and_rank(2)
    settings = settings_of()
    expected = round_of(whole, settings, 8)
    found = must_read(whole, settings, distinct=16.0)
    each = 3 * NANO.moe_intermediate_size // 2 * NANO.hidden_size * 17 // 32
    assert found[EXPERTS] == 4 * 16 * each
    rest = sum(found.values()) - found[EXPERTS]
    assert rest == expected.nbytes - expected.weights[EXPERTS]


class Clock(Runner):
    """Whose calls take 9 ms and 5 ms a round, and whose rounds emit two tokens."""

    def __init__(self):
        self.calls = []

    def rewind(self):
        pass

    def run(self, params, tokens, options, program=None):
        rounds = -(-tokens // 2)
        self.calls.append(rounds)
        return 0.009 + 0.005 * rounds, rounds, 2 * rounds


def test_a_rounds_time_has_none_of_a_calls_in_it():
    clock = Clock()
    found = clock.measure(None, rounds=24, repeats=3, options={})
    assert found["ms"] == pytest.approx(5.0) and found["call_ms"] == pytest.approx(9.0)
    assert found["spread"] == pytest.approx(0.0) and found["tokens_a_round"] == 2
    assert (found["rounds"], clock.calls) == (3 * 12, [1, 1, 12, 1, 12, 1, 12])
    with pytest.raises(MimoError, match="--rounds=2: a call of 1 rounds .* give more"):
        clock.measure(None, rounds=2, repeats=1, options={})


# --- routing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_biases_make_the_routing_that_they_are_for(exponent, rng):
    """Distinct experts of independent rows; the mean of so many draws is known to about 0.05."""
    experts, choices, rows, draws = 48, 5, 7, 1500
    chances = routing.shares(experts, choices, exponent)
    assert chances.sum() == pytest.approx(choices)
    assert (np.diff(chances) <= 1e-12).all()
    bias = routing.bias_for(chances)
    scores = 1 / (1 + np.exp(-rng.normal(size=(draws, rows, experts)))) + bias
    ids = np.argsort(-scores, axis=-1)[..., :choices]
    found = routing.count(ids.reshape(draws, rows, choices)).mean()
    assert abs(found - routing.expected(experts, choices, rows, exponent)) < 0.8
    # And straight from the law, without replacement.
    rates = np.arange(1, experts + 1.0) ** -exponent
    keys = np.log(rates) + rng.gumbel(size=(draws, rows, experts))
    straight = routing.count(np.argsort(-keys, axis=-1)[..., :choices]).mean()
    assert abs(straight - routing.expected(experts, choices, rows, exponent)) < 0.8


def test_biases_reach_the_routers():
    config, _ = shorten(dataclasses.replace(NANO, n_routed_experts=37), None, 3)
    _, plan = whole_and_rank(2, config, None)
    params = random_params(plan, seed=1)
    routers = [layer["ffn"]["router"] for layer in list(params[0]["layers"].values())[1:]]
    assert not any(np.asarray(router["bias"][...]).any() for router in routers)
    biased, _ = routing.set_bias(plan, params, 1.0, seed=2)
    found = [
        np.asarray(layer["ffn"]["router"]["bias"][...])
        for layer in list(biased["layers"].values())[1:]
    ]
    assert all(len(np.unique(bias)) == 37 for bias in found)
    assert not np.array_equal(found[0], found[1])


def test_a_state_holds_noise_at_the_context():
    _, plan = whole_and_rank(2, *shorten(NANO, DRAFTER, 1))
    state = random_state(plan, settings_of(), context=29, seed=3)
    assert (int(state.length[0]), int(state.cached[0])) == (29, 28)
    for leaf in jax.tree.leaves((state.caches, state.contexts)):
        assert 0.9 < float(jnp.std(leaf.astype(jnp.float32))) < 1.1
    assert int(state.tokens.max()) < NANO.vocab_size // 2


# --- the profile ----------------------------------------------------------------------------------

TEXT = """HloModule jit_body, is_scheduled=true

%one (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %a.1 = f32[4]{0} add(%p, %p), metadata={op_name="x"}
}

%two (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %a.2 = f32[4]{0} add(%q, %q), metadata={op_name="y"}
}

%other (r: f32[4]) -> f32[4] {
  %r = f32[4]{0} parameter(0)
  ROOT %m.1 = f32[4]{0} multiply(%r, %r)
}

%drafts (d: f32[4]) -> f32[4] {
  %d = f32[4]{0} parameter(0)
  ROOT %add_fusion.7 = f32[4]{0} fusion(%d), calls=%one, AT/body/drafter/cond/norm/add"}
}

%nothing (n: f32[4]) -> f32[4] {
  ROOT %n = f32[4]{0} parameter(0)
}

%last (c: f32[4]) -> pred[] {
  %c = f32[4]{0} parameter(0)
  ROOT %compare.1 = pred[] custom-call(%c), custom_call_target="library", AT/cond/lt"}
}

%body (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  %c.1 = f32[4]{0} conditional(%b, %b, %b), branch_computations={%nothing, %drafts}, AT/body/cond"}
  %add_fusion.8 = f32[4]{0} fusion(%c.1), calls=%two, AT/body/layer_0/attend/add"}
  %multiply-fusion = f32[4]{0} fusion(%add_fusion.8), calls=%other, AT/body/layer_0/norm/mul"}
  %gemm.1 = f32[4]{0} custom-call(%b), custom_call_target="cublas", AT/body/layer_1/router/"}
  ROOT %m.1 = f32[4]{0} custom-call(%b), custom_call_target="mosaic_gpu", AT/layer_1/experts/up/x"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %while.1 = f32[4]{0} while(%x), condition=%last, body=%body
}
""".replace("AT/", 'metadata={op_name="jit(body)/while/')


def test_a_round_is_read_from_the_program():
    launches = Module(TEXT).round()
    assert [(one.name, one.group) for one in launches] == [
        ("compare.1", "norms, sums, others"),
        ("add_fusion.7", "drafter"),
        ("add_fusion.8", "attention proper"),
        ("multiply-fusion", "norms, sums, others"),
        ("gemm.1", "router"),
        ("m.1", "experts"),
    ]
    # Names apart, two of them are the same.
    assert launches[1].same == launches[2].same != launches[3].same
    assert kernels_a_layer(launches, (0, 1)) == {"mean": 2, "full attention": 2, "sliding": 2}


def test_device_time_goes_to_the_parts_that_it_is_of():
    """Two fusions share a kernel; a library's and Mosaic's have names of their own."""
    one_round = [
        ("loop_predicate", 0.5),
        ("add_fusion_7", 1.0),
        ("add_fusion_7", 10.0),
        ("multiply_fusion", 100.0),
        ("nvjet_something", 1000.0),
        ("nvjet_sum_of_splits", 2000.0),
        ("up_mosaic_gpu_kernel", 10000.0),
    ]
    events, time = [], 0.0
    for name, us in one_round * 3:
        events.append(Event(name, time, us))
        time += us + 2.0
    found = split(events, Module(TEXT).round(), rounds=3)
    assert {name: us for name, us in found["us"].items() if us} == pytest.approx(
        {
            "drafter": 1.0,
            "attention proper": 10.0,
            "norms, sums, others": 100.5,
            "router": 3000.0,
            "experts": 10000.0,
        }
    )
    assert found["kernels"] == 7 and found["unsure_us"] == pytest.approx(3000.5)
    assert found["busy_us"] == pytest.approx(13111.5)
    assert found["span_us"] == pytest.approx(13111.5 + 14 - 2 / 3)
    assert found["names"][0][0] == "up_mosaic_gpu_kernel"


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_measures_a_rank_of_the_shipped_model(tmp_path, capsys):
    out = tmp_path / "rank.jsonl"
    arguments = "bench rank --model mimo-nano --ranks 2 --layers 3 --contexts 70,140 --rounds 3"
    arguments += " --repeats 2 --profile-rounds 2 --read-gib 0 --steady 24 --json"
    code = cli.main([*arguments.split(), "--out", str(out)])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == bool(result["failed"])
    kinds = [(row["name"], row["context"], row["rows"]) for row in result["rounds"]]
    assert kinds == [
        ("greedy", 70, 8),
        ("sampled", 70, 8),
        ("greedy, Zipf(1)", 70, 8),
        ("plain", 70, 1),
        ("greedy", 140, 8),
    ]
    assert all(row["ms"] > 0 and row["rounds"] >= 1 for row in result["rounds"])
    uniform, zipf = (row["distinct"] for row in result["routing"])
    assert abs(uniform - 21.0) < 5 and zipf < uniform
    assert result["rounds"][3]["distinct"] == 4
    assert result["rounds"][0]["bytes"] > result["rounds"][2]["bytes"]
    assert result["projections"][0]["collectives"]["sums"] == 7
    assert sum(row["rounds"] for row in result["steady"]["calls"]) >= 24 / 8
    parts = [json.loads(line)["part"] for line in out.read_text().splitlines()]
    assert parts.count("round") == 5 and parts.count("program") == 4


@pytest.mark.slow
def test_ranks_that_run_together_are_projected_without_an_assumed_cost(capsys):
    arguments = "bench rank --model mimo-nano --ranks 4 --devices 2 --layers 3 --contexts 70"
    arguments += " --rounds 2 --repeats 1 --read-gib 0 --parts greedy"
    assert cli.main([*arguments.split(), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    (round_,), (projected,) = result["rounds"], result["projections"]
    assert result["devices"] == 2 and projected["round_ms"] == round_["ms"]
    assert projected["communication_ms"] == 0 and projected["collectives"]["sums"] == 7
    assert cli.main([*arguments.split(), "--sum-us", "3"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "2 ranks of 4 of mimo-nano" in shown
        and "assuming 3 us a sum and 3 us a gather more than measured" in shown
    )


@pytest.mark.slow
def test_output_projections_in_fp8_are_half_the_bytes(capsys):
    arguments = "bench rank --model mimo-nano --ranks 2 --layers 3 --contexts 70 --rounds 2 --json"
    arguments += " --repeats 1 --read-gib 0 --parts greedy --o-proj "
    reads = []
    for kept in ("stored", "fp8"):
        assert cli.main([*(arguments + kept).split()]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["o_proj"] == kept
        reads.append(result["rounds"][0]["bytes"])
    # Three layers of 256 x 128 on each of two ranks; a scale for 128 x 128.
    assert reads[0] - reads[1] == 3 * (256 * 128 - 4 * 2)


def test_parts_that_do_not_exist_are_refused(capsys):
    assert cli.main(["bench", "rank", "--model", "mimo-nano", "--parts", "greedy,all"]) == 1
    assert "--parts: all unknown" in capsys.readouterr().err
