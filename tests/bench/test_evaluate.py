"""`mimo eval`: prompts and their domains, what is counted, and the whole command."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import checkpoint, write_tokenizer  # noqa: F401

import mimo_jax
from mimo_jax import cli
from mimo_jax.bench import evaluate
from mimo_jax.bench.acceptance import rounds_by_source
from mimo_jax.commands import eval as eval_command
from mimo_jax.config import ModelConfig
from mimo_jax.errors import MimoError
from mimo_jax.quant.mxfp4 import RULES
from mimo_jax.text.tokenizer import Tokenizer
from mimo_jax.train.export import save_target, target_arrays
from mimo_jax.train.pretrain import init_params
from tests.train.tiny_run import SHAPE


@dataclasses.dataclass(frozen=True)
class Answer:
    """As much of an Output as is counted."""

    rounds: tuple[int, ...]
    tokens: tuple[int, ...]
    stats: "Answer | None" = None
    acceptance_histogram: tuple[int, ...] = ()


def answer(lengths, rng):
    """An answer whose rounds emitted so many tokens, no token twice."""
    rounds = tuple(np.repeat(np.arange(len(lengths)), lengths).tolist())
    tokens = tuple(rng.permutation(5000)[: len(rounds)].tolist())
    histogram = tuple(np.bincount(lengths, minlength=6).tolist())
    return Answer(rounds, tokens, Answer((), (), None, histogram))


def test_what_is_counted(rng):
    lengths = [rng.integers(1, 6, n).tolist() for n in (7, 3, 11)]
    outputs = [answer(some, rng) for some in lengths]
    prompts = [[9000 + n, 9001] for n in range(3)]
    found = evaluate.measure(prompts, outputs, 5, 64)
    every = np.concatenate(lengths)
    assert found["answers"] == 3 and found["rounds"] == len(every)
    assert found["tokens"] == every.sum()
    assert math.isclose(found["acceptance_length"], every.mean())
    # Nothing is repeated, and nothing can be looked up.
    assert math.isclose(found["without_repeats"], every.mean())
    assert found["prompt_lookup"] == 1 and found["repeated_share"] == 0
    assert found["histogram"] == np.bincount(every, minlength=6).tolist()
    shares = [(every > k).mean() for k in range(1, 5)]
    assert np.allclose(found["by_position"], shares)


def test_domains_take_turns(tmp_path):
    first, second = tmp_path / "code.jsonl", tmp_path / "chat.jsonl"
    lines = [{"text": "a", "file": "flask/x.py"}, {"text": "b", "file": "flask/y.py"},
             {"text": "c", "domain": "maths"}, {"text": "d"}]  # fmt: skip
    first.write_text("\n".join(map(json.dumps, lines)))
    second.write_text('{"text": "e"}\n')
    prompts = evaluate.read_prompts([str(first), str(second)], 9)
    assert [(p["domain"], p["text"]) for p in prompts] == [
        ("flask", "a"), ("maths", "c"), ("code", "d"), ("chat", "e"), ("flask", "b")
    ]  # fmt: skip
    assert len(evaluate.read_prompts([str(first)], 2)) == 2
    second.write_text('{"words": "e"}\n')
    with pytest.raises(MimoError, match="chat.jsonl, line 1 is no object with a text"):
        evaluate.read_prompts([str(second)], 1)
    second.write_text("")
    with pytest.raises(MimoError, match="hold no prompt"):
        evaluate.read_prompts([str(second)], 1)


def test_prompts_of_a_length(checkpoint, tmp_path):  # noqa: F811
    tokenizer = Tokenizer.from_file(checkpoint / "tokenizer.json")
    (tmp_path / "a.txt").write_text("abx = ba\n" * 50)
    cut = evaluate.cut_prompts([str(tmp_path / "a.txt")], tokenizer, [11, 37], 4)
    for length, pieces in cut.items():
        assert len(pieces) == 4 and {len(prompt) for prompt in pieces} == {length}
        assert len({tuple(prompt) for prompt in pieces}) > 1
    assert list(cut) == [11, 37]
    # They end at the same places.
    assert [piece[-11:] for piece in cut[37]] == cut[11]
    with pytest.raises(MimoError, match="a context of 9999 is asked for"):
        evaluate.cut_prompts([str(tmp_path / "a.txt")], tokenizer, [5, 9999], 4)


def slow_sources(tokens, prompt, rounds, reach):
    """By looking at every earlier place for every round."""
    found = {"near": [], "far": [], "new": []}
    starts = [i for i in range(len(rounds)) if i == 0 or rounds[i] != rounds[i - 1]]
    for start in starts:
        place, size = prompt + start, list(rounds).count(rounds[start])
        if place + 3 > len(tokens):
            continue
        wanted = tokens[max(0, place - 4) : place + 3]
        distances = [place - at for at in range(4, place - 2) if tokens[at - 4 : at + 3] == wanted]
        if not distances:
            found["new"].append(size)
        elif reach is None or min(distances) + 4 <= reach:
            found["near"].append(size)
        else:
            found["far"].append(size)
    return found


@pytest.mark.parametrize("reach", [None, 23, 61])
def test_where_rounds_copy_from(reach, rng):
    """Text that repeats pieces of itself, near and far."""
    pieces = [rng.integers(0, 50, n).tolist() for n in (13, 17, 23)]
    tokens = sum((pieces[i] for i in (0, 1, 0, 2, 1, 0, 2, 2, 1, 1, 0)), [])
    prompt = 29
    lengths = rng.integers(1, 6, len(tokens)).cumsum()
    rounds = np.searchsorted(lengths, np.arange(len(tokens) - prompt), side="right").tolist()
    found = rounds_by_source(tokens, prompt, rounds, reach)
    assert found == slow_sources(tokens, prompt, rounds, reach)
    assert bool(found["far"]) == (reach is not None) and found["near"] and found["new"]
    assert len(rounds) - 5 <= sum(map(sum, found.values())) <= len(rounds)


@pytest.mark.slow
def test_the_command(checkpoint, tmp_path, capsys):  # noqa: F811
    (tmp_path / "a.txt").write_text("".join(f"{x}b = {x}x\n" for x in "acdefghk" * 40))
    (tmp_path / "p.jsonl").write_text('{"text": "abx = ba"}\n{"text": "cd", "domain": "d"}\n')
    arguments = ["eval", "--model", str(checkpoint), "--text", str(tmp_path / "a.txt")]
    arguments += ["--prompts", str(tmp_path / "p.jsonl"), "--temperatures", "0", "1"]
    arguments += ["--contexts", "9", "30", "--count", "2", "--max-tokens", "7", "--rows", "3"]
    assert cli.main([*arguments, "--length", "50"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert set(result["acceptance"]["by_temperature"]) == {"0", "1"}
    assert set(result["acceptance"]["by_domain"]) == {"p", "d"}
    assert set(result["acceptance"]["by_context"]) == {"9", "30"}
    assert "Acceptance by domain" in out and "Held-out text" in out
    assert result["acceptance"]["by_context"]["30"]["tokens"] == 14

    # Bits per byte by plain decoding's own forward pass.
    text = result["text"]
    assert (text["rows"], text["tokens"]) == (3, 3 * 49)
    with mimo_jax.load(checkpoint, devices=1, experts="dequantized", progress=False) as engine:
        ids = engine.tokenizer.encode((tmp_path / "a.txt").read_text())[:150]
        nats, size = plain_nats(engine, np.array(ids).reshape(3, 50))
    assert text["bytes"] == size
    assert math.isclose(text["bits_per_byte"], nats / math.log(2) / size, rel_tol=1e-4)


def test_mxfp4_after_training(tmp_path, rng):
    """A dense checkpoint measured with MXFP4 experts is one whose experts were so stored."""
    assert eval_command.RULES == RULES
    shapes = ModelConfig.from_dict(SHAPE | {"vocab_size": 300})
    write_tokenizer(tmp_path / "tokenizer.json", 300)
    params = jax.jit(lambda: init_params(shapes, 3))()
    # Weights that matter: the first ones leave hardly more than an even guess.
    params = jax.tree.map(lambda p: 8 * p if p.ndim > 2 else p, params)
    for name, rule in (("dense", None), ("mse", "mse")):
        arrays = target_arrays(params, rule, jnp.dtype(jnp.float32))
        save_target(tmp_path / name, shapes, arrays, tmp_path / "tokenizer.json", {})
    np.save(tmp_path / "text.npy", rng.integers(4, 300, 200).astype(np.int32))
    how = {"rows": 4, "length": 40, "devices": 1}
    texts = [str(tmp_path / "text.npy")]
    dense, made = (
        evaluate.text_quality(tmp_path / "dense", texts, rule=rule, **how) for rule in (None, "mse")
    )
    assert made == evaluate.text_quality(tmp_path / "mse", texts, **how)
    assert made["bits_per_token"] != dense["bits_per_token"]
    with pytest.raises(MimoError, match="stores its experts in MXFP4 already"):
        evaluate.text_quality(tmp_path / "mse", texts, rule="mse", **how)


def plain_nats(engine, rows):
    """Cross-entropy of rows by the model's cached forward pass, and the bytes predicted."""
    from flax import nnx

    from mimo_jax.cache import init_cache

    model = nnx.merge(engine._plan.graphs[0], engine._params[0])
    config, (b, t) = engine.config, rows.shape
    caches = tuple(
        init_cache(a, a.num_kv_heads, b, t, t, jnp.float32)
        for a in map(config.attention, range(config.num_hidden_layers))
    )
    live, start = jnp.ones((b, t), bool), jnp.zeros(b, jnp.int32)
    h, _, _ = model(jnp.asarray(rows, jnp.int32), start, live, caches, ())
    logits = np.asarray(model.logits(h), np.float64)[:, :-1]
    top = logits.max(-1)
    nats = np.log(np.exp(logits - top[..., None]).sum(-1)) + top
    nats -= np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
    return nats.sum(), len(engine.tokenizer.decode_bytes(rows[:, 1:].ravel().tolist()))
