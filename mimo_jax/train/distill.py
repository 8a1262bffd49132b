"""The target's own answers to prompts out of the data, made in large batches, as training rows."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.checkpoint.manifest import write_atomically
from mimo_jax.decode.program import Plan, Settings, make_program, state_maker
from mimo_jax.decode.sampling import Request
from mimo_jax.errors import MimoError
from mimo_jax.train.sources import Tokens

TOP_P = 0.95
DONE = "own.json"
"""How the answers in a folder were made."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """What is generated.

    Attributes:
      rows: how many; rounded up to whole batches.
      length: tokens of a row, prompt included.
      prompt: the largest share of a row that its prompt takes.
      batch: rows at once.
      greedy: share without noise.
      coldest: least temperature of the others.
      hottest: largest temperature of the others.
      seed: of prompts and noise.
    """

    rows: int
    length: int
    prompt: float
    batch: int
    greedy: float
    coldest: float
    hottest: float
    seed: int


def prepare_answers(
    folder: Path,
    plan: Plan,
    params: nnx.State,
    tokens: Tokens,
    how: Answers,
    end: int,
    log: Callable,
) -> Tokens:
    """The rows of `generate`, kept in a folder so that a run that goes on has the same ones."""
    done = folder / DONE
    if not done.exists() or json.loads(done.read_text()) != dataclasses.asdict(how):
        made = generate(plan, params, tokens, how, end, log)
        np.save(folder / "own.npy", made.ids)
        np.save(folder / "own-trained.npy", made.trained)
        write_atomically(done, (json.dumps(dataclasses.asdict(how)) + "\n").encode())
    return _load(folder)


def read_answers(folder: Path, how: Answers) -> Tokens:
    """The rows that `prepare_answers` keeps in a folder, for another run to use.

    Raises:
      MimoError: if there are none, or if they were made in another way.
    """
    done = folder / DONE
    if not done.exists():
        raise MimoError(f"{folder} holds no answers of a target: leave drafter.own_from out.")
    made, wanted = json.loads(done.read_text()), dataclasses.asdict(how)
    changed = [f"{k}: {v!r}, now {wanted.get(k)!r}" for k, v in made.items() if v != wanted.get(k)]
    if changed:
        raise MimoError(
            f"{folder} holds answers made in another way ({'; '.join(changed)}): use the same "
            "settings, or leave drafter.own_from out."
        )
    return _load(folder)


def _load(folder: Path) -> Tokens:
    return Tokens(np.load(folder / "own.npy"), np.load(folder / "own-trained.npy"))


def generate(
    plan: Plan, params: nnx.State, tokens: Tokens, how: Answers, end: int, log: Callable
) -> Tokens:
    """Answers prompts out of the data by the loop that decoding runs, some greedily.

    Args:
      plan: of the target, without a drafter.
      params: its parameters.
      tokens: the data.
      how: what to generate.
      end: the id between documents.
      log: gets words on the progress.

    Returns:
      rows of `how.length` tokens, one after another; trained on is what the target wrote. No token
      ends a row early: what follows an end of text is trained on too, as in the data.

    Raises:
      MimoError: if there is no prompt that leaves room for an answer.
    """
    batch = min(how.batch, how.rows)
    random = np.random.default_rng(how.seed)
    prompts = _prompts(tokens, how, end)
    settings = Settings(batch, how.length, 1, 64, params["embedding"][...].dtype)
    program, empty = make_program(plan, settings), state_maker(plan, settings)
    ids, trained, start = [], [], time.perf_counter()
    for number in range(-(-how.rows // batch)):
        rows = np.zeros((batch, how.length + settings.block), np.int32)
        lengths = np.zeros(batch, np.int32)
        for row in range(batch):
            prompt = prompts(random)
            rows[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        noisy = random.random(batch) >= how.greedy
        temperature = random.uniform(how.coldest, how.hottest, batch) * noisy
        state = empty()
        fields = {"tokens": rows, "length": lengths}
        places = {name: getattr(state, name).sharding for name in fields}
        state = dataclasses.replace(state, **jax.device_put(fields, places))
        request = _request(how, batch, number, temperature)
        state = program((params, None), state, request)
        ids.append(np.asarray(state.tokens)[:, : how.length])
        trained.append(np.arange(how.length) >= lengths[:, None])
        seconds = time.perf_counter() - start
        log(f"{len(ids) * batch} of the target's own answers, {seconds:.0f} s")
    flat = np.concatenate(ids).reshape(-1).astype(tokens.ids.dtype)
    return Tokens(flat, np.concatenate(trained).reshape(-1))


def _request(how: Answers, batch: int, number: int, temperature: np.ndarray) -> Request:
    """A batch's request: each row's noise is its own."""
    return Request(
        limit=jnp.full(batch, how.length, jnp.int32),
        pause=jnp.full(batch, how.length, jnp.int32),
        eos=jnp.full(1, -1, jnp.int32),
        temperature=jnp.asarray(temperature, jnp.float32),
        top_p=jnp.full(batch, TOP_P, jnp.float32),
        top_k=jnp.zeros(batch, jnp.int32),
        seed=jnp.uint32(how.seed),
        sequence=jnp.arange(batch, dtype=jnp.int32) + number * batch,
        max_draft=jnp.int32(0),
    )


def _prompts(tokens: Tokens, how: Answers, end: int) -> Callable:
    """Draws a prompt: where the data have chats, all before an answer; else a piece of text.

    Prompts take at most the share `how.prompt` of a row, pieces of text at least an eighth.
    """
    longest, shortest = int(how.length * how.prompt), max(1, how.length // 8)
    ids, trained = tokens.ids, tokens.trained
    starts = np.flatnonzero(trained[1:] & ~trained[:-1]) + 1
    if not len(starts):
        if len(ids) <= how.length:
            raise MimoError(
                f"The data have {len(ids)} tokens, a prompt is drawn from {how.length} (drafter."
                "own_length): use more text, or shorter rows."
            )

        def draw(random: np.random.Generator) -> np.ndarray:
            first = random.integers(0, len(ids) - longest)
            return ids[first : first + random.integers(shortest, longest + 1)]

        return draw
    ends = np.concatenate([[-1], np.flatnonzero(np.asarray(ids) == end)])
    begins = ends[np.searchsorted(ends, starts) - 1] + 1
    short = np.flatnonzero(starts - begins <= longest)
    if not len(short):
        raise MimoError(
            f"Every chat has more than {longest} tokens before an answer, the share "
            f"drafter.own_prompt={how.prompt} of drafter.own_length={how.length}: make rows "
            "longer, or the share larger."
        )

    def draw_chat(random: np.random.Generator) -> np.ndarray:
        index = short[random.integers(len(short))]
        return ids[begins[index] : starts[index]]

    return draw_chat
