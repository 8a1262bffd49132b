"""A rank's compiled program and its state: compiled, run for some rounds, timed."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mimo_jax.bench.hlo import Launch, Module
from mimo_jax.bench.rank_profile import OPTIONS, record, split
from mimo_jax.bench.rank_routing import make_probe
from mimo_jax.bench.rank_weights import at, random_state
from mimo_jax.config import ModelConfig
from mimo_jax.decode.options import Options
from mimo_jax.decode.program import Plan, Settings, make_program
from mimo_jax.drafter_config import AnyDrafterConfig
from mimo_jax.errors import MimoError
from mimo_jax.planning.groups import EXPERTS
from mimo_jax.planning.report import round_of

SAMPLED = {"temperature": 1.0, "top_p": 0.95}
GREEDY: dict[str, Any] = {}


def shorten(
    config: ModelConfig, drafter: AnyDrafterConfig | None, layers: int | None
) -> tuple[ModelConfig, AnyDrafterConfig | None]:
    """The model's first layers; the drafter then taps the last of them for all that are gone."""
    if layers is None or layers >= config.num_hidden_layers:
        return config, drafter
    config = dataclasses.replace(
        config,
        num_hidden_layers=layers,
        hybrid_layer_pattern=config.hybrid_layer_pattern[:layers],
        moe_layer_freq=config.moe_layer_freq[:layers],
    )
    if drafter is not None:
        taps = tuple(min(layer, layers - 1) for layer in drafter.target_layer_ids)
        drafter = dataclasses.replace(drafter, target_layer_ids=taps)
    return config, drafter


def must_read(whole: Plan, settings: Settings, distinct: float) -> dict[str, int]:
    """Bytes that a round must read, by group, as `mimo plan` counts them.

    Args:
      whole: the plan on all devices, of which each reads as much.
      settings: of the program; all rows of its caches count, and the rows of a block.
      distinct: experts a layer that were chosen.
    """
    figures = round_of(whole, settings, settings.block)
    weights = dict(figures.weights)
    if EXPERTS in weights:
        weights[EXPERTS] = round(weights[EXPERTS] * distinct / figures.experts)
    return weights | {f"cache: {name}": size for name, size in figures.caches.items()}


class Runner:
    """A program of a plan, and the state that it goes on with.

    Args:
      plan: of the rank, on a device that is there.
      settings: to compile for.
      context: tokens at which timing begins.
      seed: of the state's noise.
    """

    def __init__(self, plan: Plan, settings: Settings, context: int, seed: int):
        self.plan, self.settings, self.context = plan, settings, context
        self.state = random_state(plan, settings, context, seed)
        self._program: Any = None
        self._alone: Any = None

    def request(self, tokens: int, options: dict[str, Any]):
        """Up to that many tokens from now on, or whole rounds until there are as many."""
        length = np.array([min(tokens, self.settings.max_len)], np.int32)
        checked = Options(max_draft=self.settings.block - 1, ignore_eos=True, **options)
        limit = np.array([self.settings.max_len], np.int32)
        return checked.request(limit, length, (), self.plan.mesh)

    def compile(self, params: Any) -> dict[str, float]:
        """Compiles the program; seconds of each step."""
        program = make_program(self.plan, self.settings, OPTIONS)
        request = self.request(self.context + 1, GREEDY)
        times = [time.perf_counter()]
        self.traced = program.trace(params, self.state, request)
        times.append(time.perf_counter())
        lowered = self.traced.lower()
        times.append(time.perf_counter())
        self._program = lowered.compile()
        times.append(time.perf_counter())
        trace, lower, compiled = (b - a for a, b in zip(times, times[1:], strict=False))
        return {"trace_s": trace, "lower_s": lower, "compile_s": compiled}

    @functools.cached_property
    def choices(self) -> Callable[..., Any]:
        """See `rank_routing.make_probe`: compiled once."""
        return make_probe(self.plan, self.settings)

    def launches(self, sampled: bool = False) -> list[Launch]:
        """What a round launches, in the compiled program's own words."""
        return Module(self._program.as_text()).round(sampled)

    def memory(self) -> dict[str, int]:
        """Bytes of the program's temporaries."""
        return {"temporaries": self._program.memory_analysis().temp_size_in_bytes}

    def run(
        self, params: Any, tokens: int, options: dict[str, Any], program: Any = None
    ) -> tuple[float, int, int]:
        """Decodes at least so many tokens more: seconds, rounds and tokens that it took."""
        length, before = int(self.state.length[0]), int(self.state.histogram.sum())
        request = self.request(length + tokens, options)
        jax.block_until_ready(self.state)
        state, self.state = self.state, None
        start = time.perf_counter()
        state = jax.block_until_ready((program or self._program)(params, state, request))
        seconds = time.perf_counter() - start
        self.state = state
        return seconds, int(state.histogram.sum()) - before, int(state.length[0]) - length

    def rewind(self) -> None:
        """Back to the context at which timing begins."""
        self.state = at(self.state, self.context)

    def measure(
        self, params: Any, rounds: int, repeats: int, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Milliseconds a round, from the difference of a long and a short call, and a call's own.

        A random drafter's tokens are hardly ever kept, so that as many tokens take about as many
        rounds; those that were are counted.

        Returns:
          "ms", the median of the repeats; their "spread" and "all_ms"; "call_ms", what a call takes
          beside its rounds; "rounds" of the long calls, and "tokens_a_round".

        Raises:
          MimoError: if a long call has no more rounds than one of a single token.
        """
        self.run(params, 2, options)
        each, calls, total, emitted = [], [], 0, 0
        for _ in range(repeats):
            self.rewind()
            short, few, _ = self.run(params, 1, options)
            self.rewind()
            long, count, tokens = self.run(params, rounds, options)
            if count <= few:
                raise MimoError(
                    f"--rounds={rounds}: a call of {count} rounds is no longer than one of "
                    f"{few}: give more."
                )
            each.append(1e3 * (long - short) / (count - few))
            calls.append(1e3 * short - few * each[-1])
            total, emitted = total + count, emitted + tokens
        self.rewind()
        middle = statistics.median(each)
        return {
            "ms": middle,
            "spread": (max(each) - min(each)) / middle,
            "all_ms": each,
            "rounds": total,
            "tokens_a_round": emitted / total,
            "call_ms": statistics.median(calls),
        }

    def profile(self, params: Any, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
        """Device time of a round by its parts, from inside the graph; see `rank_profile.split`.

        Should the profiler not see into it, each kernel is launched by itself, by another program.
        """
        launches = self.launches(sampled=bool(options))
        events, count = self._record(params, rounds, options, self._program)
        graphs = len(events) > len(launches) * count // 2
        if not graphs and self.plan.mesh.devices.flat[0].platform == "gpu":
            if self._alone is None:
                request = self.request(self.context + 1, GREEDY)
                program = make_program(self.plan, self.settings)
                self._alone = program.lower(params, self.state, request).compile()
            events, count = self._record(params, rounds, options, self._alone)
        if not events:
            return {"error": "the profiler saw no kernel of a GPU"}
        return {"graphs": graphs, **split(events, launches, count)}

    def _record(self, params, rounds, options, program):
        """What the GPU ran in so many rounds, and how many they were."""
        self.rewind()
        self.run(params, 2, options, program)
        counted: list[int] = []

        def call():
            _, count, _ = self.run(params, rounds, options, program)
            counted.append(count)
            return self.state

        return record(call), counted[0]

    def close(self) -> None:
        """Frees the state and the program."""
        for leaf in jax.tree.leaves(self.state):
            if not leaf.is_deleted():
                leaf.delete()
        self.state = self._program = self._alone = None


def steady(
    runner: Runner, params: Any, tokens: int, each: int, say: Callable[..., None]
) -> dict[str, Any]:
    """A long generation, in calls of `each` tokens: how its pace and its memory change.

    Args:
      runner: with room for the tokens.
      params: of target and drafter.
      tokens: to generate.
      each: tokens a call.
      say: told of each call.
    """
    device = runner.plan.mesh.devices.flat[0]
    runner.run(params, 2, GREEDY)
    runner.rewind()
    before, rows = device.memory_stats() or {}, []
    while (length := int(runner.state.length[0])) < runner.context + tokens:
        left = runner.context + tokens - length
        seconds, count, emitted = runner.run(params, min(each, left), GREEDY)
        rows.append({"length": length, "rounds": count, "ms": 1e3 * seconds / count})
        say(**rows[-1], tokens=emitted)
    after = device.memory_stats() or {}
    full = [row["ms"] for row in rows if row["rounds"] >= each // 2] or [rows[0]["ms"]]
    return {
        "tokens": tokens,
        "calls": rows,
        "slowest_ms": max(full),
        "fastest_ms": min(full),
        "slowest_over_fastest": max(full) / min(full),
        "bytes_before": before.get("bytes_in_use"),
        "bytes_after": after.get("bytes_in_use"),
        "peak_before": before.get("peak_bytes_in_use"),
        "peak_after": after.get("peak_bytes_in_use"),
    }
