"""Benchmark of one rank of a divided model, alone on one GPU: the time of a decoding round.

The engine's own program runs on one device's part of random weights. What is measured is a round
without the collectives; what all ranks together would do is projected, in a table of its own. With
--devices some of the ranks run, each on a GPU, and exchange what they would: their sums and gathers
are in what is measured, though of so many GPUs.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from mimo_jax.bench import rank_projection as projection
from mimo_jax.bench import rank_routing as routing
from mimo_jax.bench.card import environment, print_json
from mimo_jax.bench.hlo import kernels_a_layer
from mimo_jax.bench.kernel_jobs import read_bandwidth
from mimo_jax.bench.rank_report import show
from mimo_jax.bench.rank_run import GREEDY, SAMPLED, Runner, must_read, shorten, steady
from mimo_jax.bench.rank_weights import random_params
from mimo_jax.checkpoint.layout import FP8
from mimo_jax.decode.kernel_weights import kernel_plan
from mimo_jax.decode.output_fp8 import output_fp8_plan
from mimo_jax.decode.program import Plan, Settings, make_plan
from mimo_jax.decode.rank import rank_plan
from mimo_jax.errors import MimoError
from mimo_jax.planning.models import find_model
from mimo_jax.planning.sizes import abstract_mesh
from mimo_jax.sharding import make_mesh

PARTS = ("greedy", "routing", "profile", "zipf", "sampled", "plain", "contexts")
"""What is measured; at the first context but for the last."""
DTYPE = jnp.bfloat16
ZIPF = "greedy, Zipf(1)"
SUM_US = 8.0
"""Microseconds, assumed of a sum or gather that is not measured."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `mimo bench rank`."""
    parser.add_argument("--model", default="mimo-v2.6-pro", help="a preset's name")
    parser.add_argument("--ranks", type=int, default=8, help="devices that share it (default 8)")
    parser.add_argument(
        "--devices", type=int, default=1, help="ranks that run, each on a GPU (default 1)"
    )
    parser.add_argument("--layers", type=int, help="only so many of its first layers")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)} (default: all)"
    )
    parser.add_argument(
        "--contexts", default="1024,32768,262144,1048576", help="tokens, comma-separated"
    )
    parser.add_argument(
        "--shared", action="store_true", help="one program for all contexts: compile once"
    )
    parser.add_argument("--rounds", type=int, default=100, help="of a long call (default 100)")
    parser.add_argument("--repeats", type=int, default=5, help="default 5")
    parser.add_argument("--profile-rounds", type=int, default=8, help="default 8")
    parser.add_argument(
        "--steady", type=int, default=0, metavar="TOKENS", help="generate so many, for the pace"
    )
    parser.add_argument(
        "--linear", choices=("auto", "fp8", "bf16"), default="auto", help="default: as released"
    )
    parser.add_argument(
        "--o-proj",
        choices=("stored", "fp8"),
        default="stored",
        help="attention's output projections: in bfloat16 (default), or FP8",
    )
    parser.add_argument(
        "--whole-layers", action="store_true", help="a window layer's attention in one launch"
    )
    parser.add_argument(
        "--no-kernel", action="store_true", help="experts as in checkpoints, without their kernel"
    )
    parser.add_argument(
        "--prefill-chunk", type=int, default=0, help="compile prefill too (default 0: leave it out)"
    )
    parser.add_argument(
        "--sum-us",
        type=float,
        help="assumed cost of a sum over ranks, beyond what is measured (default 8; of several "
        "devices, whose own sums are in it, 0)",
    )
    parser.add_argument("--gather-us", type=float, help="of a gather (default: a sum's)")
    parser.add_argument(
        "--cache",
        type=Path,
        help="directory of compiled programs; a second run with the same one finds them there",
    )
    parser.add_argument(
        "--read-gib", type=int, default=4, help="read for the bandwidth; 0: do not measure it"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and caches (default 0)")
    parser.add_argument("--out", type=Path, help="also write each result here as it comes")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")


class Bench:
    """A run of the benchmark: the rank's plan, its parameters, and the results so far."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.parts = _names(options.parts)
        self.contexts = [int(text) for text in options.contexts.split(",")]
        self.start = time.perf_counter()
        sum_us = options.sum_us
        if sum_us is None:
            sum_us = SUM_US if options.devices == 1 else 0.0
        gather_us = sum_us if options.gather_us is None else options.gather_us
        self.costs = {"sum_us": sum_us, "gather_us": gather_us}
        self.result: dict[str, Any] = {
            "benchmark": "rank",
            "model": options.model,
            "ranks": options.ranks,
            **environment(),
            "devices": options.devices,
            "seed": options.seed,
            "programs": [],
            "rounds": [],
            "projections": [],
            "profiles": [],
            "routing": [],
            "failed": [],
        }

    def say(self, part: str, **fields: Any) -> None:
        """A result as it comes: to stderr, and to --out."""
        line = {"part": part, "at_s": round(time.perf_counter() - self.start, 1), **fields}
        short = {k: v for k, v in line.items() if k not in ("names", "all_ms")}
        print(json.dumps(short), file=sys.stderr, flush=True)
        if self.options.out:
            with self.options.out.open("a") as out:
                out.write(json.dumps(line) + "\n")

    def declare(self) -> None:
        """The plans: on all devices, as released, and of the ranks that are there."""
        options = self.options
        found = find_model(options.model, True)
        self.config, self.drafter = shorten(found.config, found.drafter, options.layers)
        stored_fp8 = found.layout is not None and found.layout.linear == FP8
        fp8 = stored_fp8 if options.linear == "auto" else options.linear == "fp8"
        make = {"packed": True, "fp8": fp8, "dtype": DTYPE}
        mesh, devices = abstract_mesh(options.ranks), make_mesh(options.devices)
        wholes = [make_plan(self.config, drafter, mesh, **make) for drafter in (self.drafter, None)]
        if options.o_proj == "fp8":
            wholes = [output_fp8_plan(whole) for whole in wholes]
        self.whole, self.whole_plain = wholes

        def one(plan: Plan) -> Plan:
            try:
                packed = plan if options.no_kernel else kernel_plan(plan)
            except ValueError as error:
                raise MimoError(f"The expert kernel cannot take such a rank: {error}") from None
            rank = rank_plan(packed, devices)
            return dataclasses.replace(rank, whole_layers=options.whole_layers)

        self.plan, self.plain = one(self.whole), one(self.whole_plain)
        self.result |= {
            "layers": self.config.num_hidden_layers,
            "linear": "fp8" if fp8 else "bf16",
            "o_proj": options.o_proj,
            "whole_layers": options.whole_layers,
            "experts": "checkpoint order" if options.no_kernel else "kernel order",
        }

    def load(self) -> None:
        """The bandwidth, then the weights."""
        if self.options.read_gib:
            self.result["read_GB/s"] = read_bandwidth(self.options.read_gib)
        start = time.perf_counter()
        self.params = random_params(self.plan, self.options.seed)
        leaves = jax.tree.leaves(self.params)
        self.result["weights"] = {
            "bytes": sum(leaf.nbytes for leaf in leaves),
            "seconds": time.perf_counter() - start,
        }
        shape = self.config.n_routed_experts, self.config.num_experts_per_tok
        # Until they were counted.
        self.distinct = routing.expected(*shape, self.drafter.block_size, 0.0)
        self.say("weights", **self.result["weights"], read=self.result.get("read_GB/s"))

    def runner(self, plan: Plan, context: int, room: int, block: int) -> Runner:
        """A compiled program for a context, its first call done.

        With --shared it has room for all contexts, and the others are measured in it too.
        """
        options = self.options
        longest = max([context, *self.contexts]) if options.shared else context
        settings = Settings(1, longest + room, block, options.prefill_chunk, DTYPE)
        runner = Runner(plan, settings, context, options.seed + 1)
        params = self.params_of(plan)
        entries = _entries()
        found = {"context": context, "block": block, **runner.compile(params)}
        found["from_cache"] = entries is not None and _entries() == entries
        start = time.perf_counter()
        runner.run(params, 1, GREEDY)
        found |= {"first_call_s": time.perf_counter() - start, **runner.memory()}
        launches = runner.launches()
        found["launches"] = len(launches)
        found["launches_a_layer"] = kernels_a_layer(launches, self.config.hybrid_layer_pattern)
        stats = runner.plan.mesh.devices.flat[0].memory_stats() or {}
        found["bytes_in_use"] = stats.get("bytes_in_use")
        self.result["programs"].append(found)
        self.say("program", **found)
        return runner

    def params_of(self, plan: Plan) -> Any:
        """The parameters that a plan's program takes."""
        return self.params if plan is self.plan else (self.params[0], None)

    def time(self, runner: Runner, name: str, options: dict) -> dict[str, Any]:
        """Times a kind of round."""
        each = self.options.rounds, self.options.repeats
        figures = runner.measure(self.params_of(runner.plan), *each, options)
        self.say("timed", name=name, context=runner.context, **figures)
        return figures

    def report(self, runner: Runner, name: str, figures: dict, options: dict, **more) -> None:
        """Puts beside a time what the round must read, and what all ranks would do.

        Args:
          runner: that was timed.
          name: of the kind of round.
          figures: its times.
          options: of the sampling.
          **more: "distinct", experts a layer; and what else is to be remembered.
        """
        plan = runner.plan
        whole = self.whole if plan is self.plan else self.whole_plain
        settings = dataclasses.replace(
            runner.settings, max_len=runner.context + self.room_of_rounds
        )
        sizes = must_read(whole, settings, more["distinct"])
        row = {"name": name, "context": runner.context, "rows": runner.settings.block, **more}
        row |= {**figures, "bytes": sum(sizes.values()), "reads": sizes}
        if "read_GB/s" in self.result:
            row["floor_ms"] = row["bytes"] / self.result["read_GB/s"] / 1e6
            row["share"] = row["floor_ms"] / row["ms"]
        self.result["rounds"].append(row)
        self.say("round", **row)
        counts = projection.collectives(runner.traced, sampled=bool(options))
        us = projection.communication_us(counts, **self.costs)
        accepted = projection.ACCEPTED if plan is self.plan else projection.PLAIN
        projected = {"name": name, "context": runner.context, "collectives": counts, **self.costs}
        projected |= projection.project(row["ms"], us, accepted)
        self.result["projections"].append(projected)
        self.say("projection", **projected)

    def profile(self, runner: Runner, name: str, options: dict, round_ms: float) -> None:
        """Splits a round by device time."""
        params = self.params_of(runner.plan)
        found = runner.profile(params, self.options.profile_rounds, options)
        row = {"name": name, "context": runner.context, "round_ms": round_ms, **found}
        self.result["profiles"].append(row)
        self.say("profile", **row)

    def probe(self, runner: Runner, name: str, exponent: float) -> float:
        """Counts the experts that the rounds' rows choose; a round's layers' mean."""
        config = self.config
        run = runner.choices
        request = runner.request(runner.context + 1, GREEDY)
        counts, drafts, sizes = [], [], []
        runner.rewind()
        for _ in range(8):
            ids, tokens, size = jax.device_get(run(self.params, runner.state, request))
            counts.append(routing.count(ids))
            drafts.append(len(np.unique(tokens)))
            sizes.append(float(size))
            runner.run(self.params, 1, GREEDY)
        runner.rewind()
        mean = float(np.mean(counts))
        block = runner.settings.block
        wanted = routing.expected(
            config.n_routed_experts, config.num_experts_per_tok, block, exponent
        )
        row = {
            "name": name,
            "zipf": exponent,
            "distinct": mean,
            "expected": wanted,
            "by_layer": [round(float(n), 1) for n in np.mean(counts, axis=0)],
            "distinct_tokens": float(np.mean(drafts)),
            "stream": float(np.mean(sizes)),
        }
        self.result["routing"].append(row)
        self.say("routing", **row)
        if not np.isfinite(row["stream"]) or not 0.1 < row["stream"] < 1e3:
            self.fail(f"the residual stream's size is {row['stream']}, not of order one")
        if exponent == 0 and abs(mean - wanted) > routing.TOLERANCE:
            self.fail(
                f"{mean:.1f} distinct experts a layer with uniform routing, not {wanted:.1f} +- "
                f"{routing.TOLERANCE:g}: rounds read other bytes than they should"
            )
        return mean

    def fail(self, what: str) -> None:
        """Notes what is not as it must be; the exit code will say so."""
        self.result["failed"].append(what)
        self.say("failed", what=what)

    def first(self) -> None:
        """All that is measured at the first context with the drafter: times first, then parts."""
        wanted = set(self.parts) & {"greedy", "routing", "profile", "zipf", "sampled"}
        if not wanted:
            return
        options, params = self.options, self.params
        runner = self.runner(self.plan, self.contexts[0], self.room, self.drafter.block_size)
        times = {"greedy": self.time(runner, "greedy", GREEDY)}
        if "sampled" in wanted:
            times["sampled"] = self.time(runner, "sampled", SAMPLED)
        if "routing" in wanted:
            self.distinct = self.probe(runner, "uniform", 0.0)
        ways = {"greedy": GREEDY, "sampled": SAMPLED}
        for name, figures in times.items():
            self.report(runner, name, figures, ways[name], distinct=self.distinct, zipf=0.0)
        if "zipf" in wanted:
            self.params = routing.set_bias(self.plan, params, 1.0, options.seed)
            figures = self.time(runner, ZIPF, GREEDY)
            distinct = self.probe(runner, ZIPF, 1.0)
            self.report(runner, ZIPF, figures, GREEDY, distinct=distinct, zipf=1.0)
            self.params = params
        if options.shared:
            for context in self.contexts[1:] if "contexts" in self.parts else ():
                runner.context = context
                self.attempt(f"context {context}", lambda: self.at(runner))
            self.attempt("the long generation", lambda: self.steady_in(runner))
        runner.context = self.contexts[0]
        for name, figures in times.items() if "profile" in wanted else ():
            self.profile(runner, name, ways[name], figures["ms"])
        runner.close()

    def alone(self) -> None:
        """Plain decoding at its own width."""
        if "plain" not in self.parts:
            return
        runner = self.runner(self.plain, self.contexts[0], self.room, 1)
        figures = self.time(runner, "plain", GREEDY)
        distinct = float(self.config.num_experts_per_tok)
        self.report(runner, "plain", figures, GREEDY, distinct=distinct)
        if "profile" in self.parts:
            self.profile(runner, "plain", GREEDY, figures["ms"])
        runner.close()

    def longer(self) -> None:
        """The other contexts; the first too, if it was not measured."""
        measured = {row["context"] for row in self.result["rounds"] if row["rows"] > 1}
        for context in self.contexts if "contexts" in self.parts else ():
            if context not in measured:
                self.attempt(f"context {context}", lambda context=context: self.longer_at(context))
        rows = [row for row in self.result["rounds"] if row["name"] == "greedy"]
        if len(rows) > 1 and "read_GB/s" in self.result:
            self.result["growth"] = projection.growth(rows, self.result["read_GB/s"])
            self.say("growth", rows=self.result["growth"])

    def longer_at(self, context: int) -> None:
        """One of the other contexts, in a program of its own."""
        runner = self.runner(self.plan, context, self.room, self.drafter.block_size)
        figures = self.at(runner)
        if "profile" in self.parts:
            self.profile(runner, "greedy", GREEDY, figures["ms"])
        runner.close()

    def at(self, runner: Runner) -> dict[str, Any]:
        """Times greedy rounds at the runner's context."""
        runner.rewind()
        figures = self.time(runner, "greedy", GREEDY)
        self.report(runner, "greedy", figures, GREEDY, distinct=self.distinct, zipf=0.0)
        return figures

    @property
    def room(self) -> int:
        """Tokens that the caches hold beyond a context."""
        timed = self.room_of_rounds
        return max(timed, self.room_of_steady) if self.options.shared else timed

    @property
    def room_of_rounds(self) -> int:
        """All that timed rounds could emit."""
        return (self.options.rounds + 4) * self.drafter.block_size

    @property
    def room_of_steady(self) -> int:
        """Likewise, for the long generation."""
        return self.options.steady + 8 * self.drafter.block_size

    def attempt(self, name: str, do: Callable[[], None]) -> None:
        """Does a part; if it fails, says so and lets the others have their turn."""
        try:
            do()
        except Exception as error:  # whatever it is: the device's time is dear
            traceback.print_exc()
            self.fail(f"{name}: {str(error)[:500]}")

    def steady(self) -> None:
        """A long generation, in a program of its own."""
        if self.options.steady and "steady" not in self.result:
            block = self.drafter.block_size
            runner = self.runner(self.plan, self.contexts[0], self.room_of_steady, block)
            self.steady_in(runner)
            runner.close()

    def steady_in(self, runner: Runner) -> None:
        """A long generation from the first context on."""
        if tokens := self.options.steady:
            runner.context = self.contexts[0]
            runner.rewind()
            each = min(1000, max(tokens // 4, 1))

            def say(**fields: Any) -> None:
                self.say("pace", **fields)

            self.result["steady"] = steady(runner, self.params, tokens, each, say)
            self.say("steady", **self.result["steady"])


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in PARTS]:
        raise MimoError(f"--parts: {', '.join(unknown)} unknown; there are {', '.join(PARTS)}.")
    return names


def _entries() -> int | None:
    """Programs in the persistent cache, if there is one."""
    folder = jax.config.jax_compilation_cache_dir
    return len(list(Path(folder).glob("*-cache"))) if folder else None


def _prepare(options: argparse.Namespace) -> None:
    """Memory and the cache of compiled programs, before the device is used."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    if options.cache:
        options.cache.mkdir(parents=True, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(options.cache))
        compilation_cache.reset_cache()
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)


def main(options: argparse.Namespace) -> int:
    """Runs the benchmark and prints its tables and its JSON line."""
    _prepare(options)
    bench = Bench(options)
    bench.declare()
    bench.load()
    bench.attempt("the first context", bench.first)
    bench.attempt("plain decoding", bench.alone)
    bench.longer()
    bench.attempt("the long generation", bench.steady)
    if not options.json:
        show(bench.result)
    print_json(bench.result)
    for failure in bench.result["failed"]:
        print(f"mimo bench rank: {failure}", file=sys.stderr)
    return 1 if bench.result["failed"] else 0


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(_parser)
    sys.exit(main(_parser.parse_args()))
