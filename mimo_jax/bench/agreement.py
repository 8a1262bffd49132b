"""Do two ways of loading a checkpoint give the same tokens? Differences must be near-ties.

    python -m mimo_jax.bench.agreement checkpoints/mimo-nano --right '{"kernel": false}'

Greedy answers of the left engine are compared with the right one's, token by token. Where they
differ, the right engine's logits for that place must have the two tokens in question as their
greatest two, within 2 units in the last place of bfloat16; the left engine then goes on from the
right one's text. Drafting must change nothing on the left at all. The exit code is 1 if a
difference is no near-tie, if more than 1 token in 1,000 differs, or if drafting changed a token.

    XLA='{"kernel": false, "dtype": "bfloat16"}'
    python -m mimo_jax.bench.agreement checkpoints/mimo-nano --left "$XLA" --right "$XLA" --reorder

adds up the left engine's products in another order and changes nothing else: how often bfloat16
itself lets tokens differ, beside which another program's differences are to be seen.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

import mimo_jax
from mimo_jax.bench.card import environment, print_json
from mimo_jax.bench.generate import read_prompts
from mimo_jax.decode.prefill import prefill
from mimo_jax.decode.program import Settings, make_state
from mimo_jax.decode.state import state_specs
from mimo_jax.model import layers
from mimo_jax.sharding import AXIS, Parallel

ULPS = 2
"""Units in the last place of bfloat16 within which two logits are a near-tie."""
MOST = 1e-3
"""Differences a token that are allowed, near-ties all of them."""
_CHUNK = 64


def ulps_apart(high: float, low: float) -> float:
    """The distance of two numbers in units in the last place of the greater one in bfloat16."""
    unit = 2.0 ** (np.floor(np.log2(max(abs(high), abs(low), 2.0**-126))) - 7)
    return float(abs(high - low) / unit)


def next_logits(engine: Any):
    """A function of token ids that gives the float32 logits of the token after them, [w]."""
    plan, params = engine._plan, engine._params
    settings = Settings(1, engine.max_len, engine.block, _CHUNK, engine._dtype)
    state = make_state(plan, settings)
    specs = state_specs(jax.eval_shape(lambda: state), plan.rules)

    def body(params, state):
        parallel = Parallel(AXIS, experts=plan.layout == "expert")
        model = nnx.merge(plan.graphs[0], params[0])
        with plan.tracing():
            state = prefill(model, None, (), state, _CHUNK, parallel)
            last = (state.length - 1)[:, None]
            newest = jnp.take_along_axis(state.tokens, last, axis=1)
            live = jnp.ones((1, 1), bool)
            h, *_ = model(newest, state.length - 1, live, state.caches, (), parallel)
            return parallel.gather(model.logits(h), -1)[0, 0]

    run = jax.jit(
        jax.shard_map(
            body,
            mesh=plan.mesh,
            in_specs=(plan.param_specs, specs),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    )

    def logits(tokens: list[int]) -> np.ndarray:
        row = np.zeros(state.tokens.shape, np.int32)
        row[0, : len(tokens)] = tokens
        fields = {"tokens": row, "length": np.full(1, len(tokens), np.int32)}
        places = {name: getattr(state, name).sharding for name in fields}
        filled = dataclasses.replace(state, **jax.device_put(fields, places))
        return np.asarray(run(params, filled))

    return logits


def differences(left: Any, right_tokens: list[int], prompt: list[int], logits: Any) -> list[dict]:
    """Where the left engine would not have written the right one's text; each place adjudicated.

    Args:
      left: the engine.
      right_tokens: the other's greedy answer.
      prompt: token ids.
      logits: from `next_logits`, of the right engine.
    """
    generate = partial(left.generate, speculative=False, ignore_eos=True)
    found, done = [], 0
    while done < len(right_tokens):
        rest = right_tokens[done:]
        tokens = list(generate([*prompt, *right_tokens[:done]], max_tokens=len(rest)).tokens)
        same = next((i for i, (a, b) in enumerate(zip(tokens, rest, strict=True)) if a != b), None)
        if same is None:
            break
        values = logits([*prompt, *right_tokens[: done + same]])
        first, second = (int(i) for i in np.argsort(-values, kind="stable")[:2])
        apart = ulps_apart(float(values[first]), float(values[second]))
        pair = {tokens[same], rest[same]} == {first, second}
        known = {"at": done + same, "left": tokens[same], "right": rest[same]}
        found.append({**known, "ulps": apart, "near_tie": bool(pair and apart <= ULPS)})
        done += same + 1
    return found


def compare(left: Any, right: Any, prompts: list[str], max_tokens: int) -> dict[str, Any]:
    """Compares two engines on prompts; counts tokens, near-ties and what is worse."""
    logits = next_logits(right)
    tokens, drafted, found = 0, 0, []
    options = {"max_tokens": max_tokens, "ignore_eos": True}
    for number, prompt in enumerate(prompts):
        plain = right.generate(prompt, speculative=False, **options)
        ids = list(right.tokenizer.encode(prompt))
        places = differences(left, list(plain.tokens), ids, logits)
        found += [{"prompt": number, **place} for place in places]
        tokens += len(plain.tokens)
        own = [left.generate(prompt, speculative=s, **options).tokens for s in (True, False)]
        drafted += own[0] != own[1]
        print(f"\r{number + 1}/{len(prompts)} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    bad = [place for place in found if not place["near_tie"]]
    return {
        "tokens": tokens,
        "near_ties": len(found) - len(bad),
        "worse": bad,
        "differences": found,
        "answers_that_drafting_changed": drafted,
        "agree": not bad and not drafted and len(found) <= MOST * tokens,
    }


class Reordered:
    """An engine whose products are made of two halves, added: other sums of the same terms."""

    def __init__(self, engine: Any):
        self._engine = engine

    def generate(self, *arguments, **options):
        """As the engine's; its programs are traced here."""
        with _halved_products():
            return self._engine.generate(*arguments, **options)


@contextlib.contextmanager
def _halved_products():
    whole = layers._product

    def halved(axes: str, x: jax.Array, y: jax.Array) -> jax.Array:
        if axes != "...i,oi->...o":
            return whole(axes, x, y)
        half = x.shape[-1] // 2
        low = whole(axes, x[..., :half], y[..., :half])
        return low + whole(axes, x[..., half:], y[..., half:])

    layers._product = halved
    try:
        yield
    finally:
        layers._product = whole


def main() -> int:
    """Loads, compares, and prints a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a checkpoint's directory")
    parser.add_argument("--left", type=json.loads, default={}, help="JSON: arguments of load")
    parser.add_argument("--right", type=json.loads, default={}, help="JSON: arguments of load")
    parser.add_argument(
        "--reorder", action="store_true", help="add up the left engine's products otherwise"
    )
    parser.add_argument("--prompts", type=Path, help="JSONL with a text a line")
    parser.add_argument("--count", type=int, default=40, help="prompts (default 40)")
    parser.add_argument("--max-tokens", type=int, default=256, help="tokens an answer")
    options = parser.parse_args()
    prompts = read_prompts(
        options.prompts or options.model / "heldout_prompts.jsonl", options.count
    )
    left, right = (
        mimo_jax.load(options.model, **{"devices": 1, "experts": "packed", **arguments})
        for arguments in (options.left, options.right)
    )
    left = Reordered(left) if options.reorder else left
    result = compare(left, right, prompts, options.max_tokens)
    known = {name: getattr(options, name) for name in ("reorder", "left", "right")}
    known["model"] = str(options.model)
    print_json({"benchmark": "agreement", **known, **environment(), **result})
    return 0 if result["agree"] else 1


if __name__ == "__main__":
    sys.exit(main())
