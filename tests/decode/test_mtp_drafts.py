"""MTP layers in the loop: each round's drafts are the oracle's, however the decoding is cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode import test_program
from flax import nnx
from helpers import Decoder, emitted, tiny_model
from oracles import to_tree
from oracles.mimo_numpy import target_forward
from oracles.mtp_numpy import draft
from oracles.random_weights import MARGIN, random_checkpoint, random_config, random_mtp

from mimo_jax.config import ModelConfig
from mimo_jax.decode.program import Settings, make_state
from mimo_jax.drafter_config import MTPConfig
from mimo_jax.errors import MimoError
from mimo_jax.model.mtp import MTP, MTPLayer
from mimo_jax.sharding import Parallel

LAYERS, BATCH, CHUNK, MAX_LEN = 3, 4, 5, 64
BLOCK = LAYERS + 1
SURE = 1e-3
"""Drafts decided by less are not compared: float32's rounding could turn them."""


@dataclasses.dataclass
class Example:
    """A compiled target with MTP layers, and the oracle's view of the same weights."""

    normed: bool
    config: dict
    decoder: Decoder
    drafts: object
    weights: dict
    layers: dict

    def reset(self, rng, agreement):
        """New weights. Above 0, what all embeddings share passes every layer: drafts agree."""
        seeded = np.random.RandomState(rng.integers(2**32))
        self.weights = random_checkpoint(self.config, seeded)
        self.layers = random_mtp(self.config, LAYERS, seeded)
        if agreement:
            self.agree(agreement * rng.standard_normal(self.config["hidden_size"]))
        self.place()

    def place(self):
        """Gives the decoder the weights."""
        mtp = to_tree.mtp(self.config, self.layers, layers=LAYERS, hidden_normed=self.normed)
        self.decoder.params = nnx.state(to_tree.target(self.config, self.weights)), nnx.state(mtp)

    def agree(self, common):
        """Adds to all embeddings, lets the layers' input pass, and weakens what is added to it."""
        table = "model.embed_tokens.weight"
        self.weights[table] = (self.weights[table] + common).astype(np.float32)
        for weights in (self.weights, self.layers):
            for name in [n for n in weights if n.endswith(("o_proj.weight", "down_proj.weight"))]:
                weights[name] = 0.3 * weights[name]
        for layer in range(LAYERS):
            name = f"layers.{layer}.eh_proj.weight"
            self.layers[name] = 0.3 * self.layers[name] + np.tile(np.eye(len(common)), 2)
            norm = f"layers.{layer}.final_layernorm.weight"
            self.layers[norm] = self.weights["model.norm.weight"]
        self.layers = {name: a.astype(np.float32) for name, a in self.layers.items()}


def make_example(normed: bool) -> Example:
    """Always the same shapes, with a window that wraps; weights come with `reset`."""
    config = random_config(np.random.RandomState(0)) | {
        "sliding_window": 7,
        "num_hidden_layers": 2,
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
    }
    target = ModelConfig.from_dict(config)
    sizes = {"batch": BATCH, "max_len": MAX_LEN, "block": BLOCK, "chunk": CHUNK}
    mtp = MTPConfig(target, LAYERS, normed)
    decoder = Decoder(np.random.default_rng(), target, mtp, **sizes)

    @jax.jit
    def drafts(params, state):
        model, drafter = map(nnx.merge, decoder.plan.graphs, params)
        wanted = jnp.int32(LAYERS)
        return drafter.draft(
            model, state.tokens, state.cached, state.contexts, wanted, BLOCK, Parallel()
        )[0]

    return Example(normed, config, decoder, drafts, {}, {})


NORMED = pytest.param(True, id="after the norm", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[pytest.param(False, id="before the norm"), NORMED])
def example(request) -> Example:
    return make_example(request.param)


def append(decoder, state, rng, most: int):
    """The state after a user has added text to some of the sequences, as a session does."""
    tokens, length = np.array(state.tokens), np.array(state.length)
    for row, end in zip(tokens, length, strict=True):
        row[end:] = rng.integers(0, decoder.plan.config.vocab_size, len(row) - end)
    length = (length + rng.integers(0, most + 1, len(length))).astype(np.int32)
    tokens = jax.device_put(tokens.astype(np.int32), state.tokens.sharding)
    return dataclasses.replace(
        state, tokens=tokens, length=jax.device_put(length, state.length.sharding)
    )


def play(example, prompts, rng):
    """Decodes round by round, with other numbers of drafts, and text added now and then.

    Returns:
      the final tokens [b, l]; and of each round the lengths before it, its drafts, how many were
      to be verified, and the lengths after it.
    """
    decoder, rounds = example.decoder, []
    state = decoder.start(prompts)
    for _ in range(14):
        if rng.random() < 0.2:
            state = append(decoder, state, rng, 9)
        before = np.array(state.length)
        if before.max() > MAX_LEN - BLOCK:
            break
        # Up to here means: prefill alone.
        state = decoder(state, limit=before)
        drafts = np.array(example.drafts(decoder.params, state))
        max_draft = int(rng.choice([0, 1, 2, 3, 3, 3, 3]))
        state = decoder(state, pause=before + 1, max_draft=max_draft)
        rounds.append((before, drafts, max_draft, np.array(state.length)))
    return np.array(state.tokens), rounds


def compare(example, tokens, rounds, row) -> tuple[int, list[int]]:
    """One sequence's rounds against the oracle: drafts compared, tokens that rounds emitted."""
    last = rounds[-1][3][row]
    margins, counts, compared = [], [], 0
    _, residuals = target_forward(example.weights, example.config, tokens[:last], margins=margins)
    if min(margins) < MARGIN:
        return 0, []
    for before, drafts, max_draft, after in rounds:
        start, end = before[row], after[row]
        wanted, sure = draft(
            example.layers,
            example.config,
            example.weights,
            residuals[-1][: start - 1],
            tokens[:start],
            example.normed,
        )
        # After a draft that could have been another one, the next layers' are others too.
        certain = next((k for k, margin in enumerate(sure) if margin < SURE), LAYERS)
        assert drafts[row, :certain].tolist() == wanted[:certain], (start, certain, max_draft)
        compared += certain
        # The tokens that were emitted are the drafts up to the first that the target refused.
        agree = drafts[row, : end - start] == tokens[start:end][:LAYERS]
        assert agree[: end - start - 1].all()
        if end - start - 1 < max_draft:
            assert not agree[end - start - 1]
        counts.append(end - start)
    return compared, counts


def check_drafts(example, rng) -> None:
    """Compares until rounds of each length were seen; after 400 sets of weights it gives up."""
    compared, counts = 0, np.zeros(BLOCK + 1, int)
    for number in range(400):
        if number >= 4 and counts[1:].min() >= 2 and compared >= 200:
            break
        example.reset(rng, agreement=(0.0, 2.0, 1.0, 2.0)[number % 4])
        first = 1 + BATCH * (number % 4)
        sizes = [first + n if first < 13 else int(rng.integers(13, 30)) for n in range(BATCH)]
        vocab = example.config["vocab_size"]
        tokens, rounds = play(example, [rng.integers(0, vocab, size) for size in sizes], rng)
        for row in range(BATCH):
            some, emitted_by_round = compare(example, tokens[row], rounds, row)
            compared += some
            counts += np.bincount(emitted_by_round, minlength=BLOCK + 1).astype(int)
    print("compared", compared, "drafts; rounds by tokens emitted", counts.tolist())
    assert counts[1:].min() >= 2 and compared >= 200, "too little was compared"
    assert example.decoder.program._cache_size() == 1


def test_drafts_in_the_loop_are_the_oracles(example, rng):
    """Prompts of 1 to 12 tokens, over the borders of chunks of 5, and longer ones."""
    check_drafts(example, rng)


def last_draft_of_a_token(example) -> np.ndarray:
    """What follows each token [w], where the target's layers add nothing to its embedding."""
    table, norm, head = (
        np.asarray(example.weights[f"{name}.weight"], np.float64)
        for name in ("model.embed_tokens", "model.norm", "lm_head")
    )
    logits = (table / np.sqrt(np.mean(table**2, axis=1, keepdims=True)) * norm) @ head.T
    first, second = np.sort(logits, axis=1)[:, -2:].T[::-1]
    return np.argmax(logits, axis=1) if (first - second).min() > SURE else None


@pytest.mark.parametrize("sign", [1, -1], ids=["always right", "never right"])
def test_layers_that_always_agree_give_four_a_round(example, sign, rng):
    """The target's next token depends on the current one alone; the layers compute the same map."""
    follows = None
    while follows is None:  # A close call would be decided by rounding.
        example.reset(rng, agreement=0.0)
        follows = last_draft_of_a_token(example)
    for weights in (example.weights, example.layers):
        for name in [n for n in weights if n.endswith(("o_proj.weight", "down_proj.weight"))]:
            weights[name] = np.zeros_like(weights[name])
    d = example.config["hidden_size"]
    for layer in range(LAYERS):
        name = f"layers.{layer}."
        example.layers[name + "enorm.weight"] = np.ones(d, np.float32)
        example.layers[name + "eh_proj.weight"] = sign * np.eye(d, 2 * d, dtype=np.float32)
        example.layers[name + "final_layernorm.weight"] = example.weights["model.norm.weight"]
    example.place()
    vocab, rounds = example.config["vocab_size"], 5
    prompts = [rng.integers(0, vocab, size) for size in (1, 2, 9, int(rng.integers(10, 30)))]
    for max_draft in (LAYERS, 1):
        emits = max_draft + 1 if sign == 1 else 1
        limits = np.array([len(prompt) for prompt in prompts]) + rounds * emits
        state = example.decoder(prompts, limit=limits, max_draft=max_draft)
        expected = np.zeros((BATCH, BLOCK + 1), int)
        expected[:, emits] = rounds
        np.testing.assert_array_equal(state.histogram, expected)
        for prompt, answer in zip(prompts, emitted(state, prompts), strict=True):
            chain = [prompt[-1]]
            while len(chain) <= len(answer):
                chain.append(follows[chain[-1]])
            assert answer == chain[1:]


def hidden_ring_one_row_short(monkeypatch):
    """A block overwrites the oldest hidden state that a round needs after one emitted token."""
    init = MTP.init_contexts

    def shorter(config, **sizes):
        contexts = init(config, **sizes)
        return dataclasses.replace(contexts, hidden=contexts.hidden[:, 1:])

    monkeypatch.setattr(MTP, "init_contexts", staticmethod(shorter))


def drafted_rows_stay(monkeypatch):
    """Only the newest row is written: those that held drafts keep them."""
    extend = MTPLayer.extend

    def newest(self, embedded, hidden, start, keep, cache, parallel):
        if embedded.shape[1] != CHUNK:
            keep = keep & (jnp.arange(keep.shape[1]) == keep.shape[1] - 1)
        return extend(self, embedded, hidden, start, keep, cache, parallel)

    monkeypatch.setattr(MTPLayer, "extend", newest)


def prompts_without_the_rows_before(monkeypatch):
    """A prompt's chunk begins at its first token: a session's earlier rows are not finished."""
    ingest = MTP.ingest_prompt

    def late(self, model, tokens, features, start, live, contexts, parallel):
        after = ingest(self, model, tokens, features, start, live, contexts, parallel)
        resumed = (start > 0)[:, None, None, None]
        layers = jax.tree.map(
            lambda new, old: jnp.where(resumed, old, new), after.layers, contexts.layers
        )
        return dataclasses.replace(after, layers=layers)

    monkeypatch.setattr(MTP, "ingest_prompt", late)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant", [hidden_ring_one_row_short, drafted_rows_stay, prompts_without_the_rows_before]
)
def test_the_comparison_catches(plant, monkeypatch, rng):
    plant(monkeypatch)
    with pytest.raises(AssertionError) as error:
        check_drafts(make_example(False), rng)
    assert "too little" not in str(error.value)


@pytest.fixture(scope="module", params=[1, 4], ids=["one device", "four devices"])
def decoder(request) -> Decoder:
    """As `test_program` has it, with MTP layers."""
    layers = test_program.BLOCK - 1
    shapes = np.random.default_rng(request.param)
    target = tiny_model(shapes, request.param, sliding_window=2 * layers)
    return Decoder(
        np.random.default_rng(),
        target,
        MTPConfig(target, layers),
        shards=request.param,
        batch=test_program.BATCH,
        max_len=test_program.MAX_LEN,
        block=test_program.BLOCK,
        chunk=8,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        test_program.test_cut_anywhere_gives_the_same,
        test_program.test_every_stop_point,
        test_program.test_nothing_to_do_changes_nothing,
        test_program.test_pauses_change_neither_tokens_nor_rounds,
    ],
    ids=lambda check: check.__name__,
)
def test_cuts_and_pauses(check, decoder, rng):
    check(decoder, rng)


def test_a_block_has_a_layer_for_each_draft(example):
    plan = example.decoder.plan
    settings = Settings(batch=1, max_len=20, block=BLOCK + 1, chunk=5, dtype=jnp.float32)
    with pytest.raises(MimoError, match="block=5 .* 3 MTP layers draft for a block of at most 4"):
        make_state(plan, settings)
