"""The exact distribution of the first four sampled tokens, and a test that samples follow it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from helpers import Decoder, make_request
from scipy import stats

from mimo_jax.config import ModelConfig
from mimo_jax.decode import loop
from mimo_jax.decode.prefill import prefill
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.sharding import Parallel

VOCAB, TOKENS, BLOCK = 8, 4, 4
BATCH, CALLS = 12_500, 8
PROMPT = np.array([3, 1, 6, 2, 0, 5])
SMALLEST_CELL = 10.0


def make_decoder() -> Decoder:
    """Fixed shapes and weights: a fair p-value would fail once in a thousand runs with new ones."""
    target = ModelConfig(
        vocab_size=VOCAB,
        hidden_size=18,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        swa_num_key_value_heads=2,
        head_dim=8,
        v_head_dim=5,
        swa_head_dim=12,
        swa_v_head_dim=6,
        hybrid_layer_pattern=(1, 0),
        moe_layer_freq=(0, 1),
        intermediate_size=22,
        moe_intermediate_size=10,
        n_routed_experts=4,
        num_experts_per_tok=2,
        partial_rotary_factor=0.501,
        rope_theta=5e3,
        swa_rope_theta=1e2,
        sliding_window=3,
        max_position_embeddings=16,
        expert_format="dense",
    )
    drafter = DrafterConfig(
        vocab_size=VOCAB,
        hidden_size=18,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=20,
        block_size=BLOCK,
        mask_token_id=3,
        target_layer_ids=(0,),
        rope_theta=1e2,
        sliding_window=7,
    )
    rng = np.random.default_rng(20261123)
    return Decoder(
        rng, target, drafter, batch=BATCH, max_len=len(PROMPT) + TOKENS, block=BLOCK, chunk=5
    )


def samples(decoder: Decoder, **sampling) -> tuple[np.ndarray, np.ndarray]:
    """100,000 answers [_, TOKENS] with DFlash on, and the acceptance histogram.

    The program is traced anew, so that what a test plants in `mimo_jax.decode.loop` is in it.
    """
    graphs, taps = decoder.plan.graphs, decoder.plan.taps

    @jax.jit
    def run(params, state, request):
        model, drafter = map(nnx.merge, graphs, params)
        state = prefill(model, drafter, taps, state, decoder.settings.chunk, Parallel())
        return loop.decode(model, drafter, taps, state, request, BLOCK, Parallel())

    answers, histogram = [], 0
    for call in range(CALLS):
        request = make_request(
            BATCH, limit=len(PROMPT) + TOKENS, max_draft=BLOCK - 1, seed=77 + call, **sampling
        )
        state = run(decoder.params, decoder.start([PROMPT] * BATCH), request)
        answers.append(np.asarray(state.tokens)[:, len(PROMPT) : len(PROMPT) + TOKENS])
        histogram = histogram + np.asarray(state.histogram).sum(axis=0)
    return np.concatenate(answers), histogram


def restrict(probabilities: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """Keeps the top_k likeliest, then of these the fewest of mass top_p; plain and slow."""
    order = np.argsort(-probabilities, kind="stable")[: top_k or None]
    kept = probabilities[order] / probabilities[order].sum()
    size = 1
    while kept[:size].sum() < top_p and size < len(kept):
        size += 1
    out = np.zeros_like(probabilities)
    out[order[:size]] = kept[:size] / kept[:size].sum()
    return out


def joint(decoder: Decoder, temperature=1.0, top_p=1.0, top_k=0) -> np.ndarray:
    """Probability of each of the VOCAB^TOKENS answers, in lexicographic order, without a cache."""
    model = decoder.merge()[0]
    answers = np.array(list(itertools.product(range(VOCAB), repeat=TOKENS)))
    whole = np.concatenate([np.tile(PROMPT, (len(answers), 1)), answers[:, :-1]], axis=1)

    @jax.jit
    def logits(tokens):
        h = model.embedding[...][tokens]
        for layer in model.layers:
            live = jnp.ones(h.shape[:2], bool)
            h = layer.sequence(
                h,
                lambda ffn, x, live=live, layer=layer: (
                    ffn(x, live, Parallel()) if layer.sparse else ffn(x, Parallel())
                ),
            )
        return model.logits(h)

    rows = np.asarray(logits(whole), np.float64)[:, len(PROMPT) - 1 :] / temperature
    single = np.exp(rows - rows.max(axis=-1, keepdims=True))
    single /= single.sum(axis=-1, keepdims=True)
    total = np.ones(len(answers))
    known: dict[bytes, np.ndarray] = {}
    for number, answer in enumerate(answers):
        for place, token in enumerate(answer):
            prefix = answer[:place].tobytes()
            if prefix not in known:
                known[prefix] = restrict(single[number, place], top_p, top_k)
            total[number] *= known[prefix][token]
    return total


def g_test(answers: np.ndarray, probabilities: np.ndarray) -> float:
    """The p-value of the G-test, cells with an expectation below SMALLEST_CELL pooled into one."""
    number = np.ravel_multi_index(answers.T, (VOCAB,) * TOKENS)
    observed = np.bincount(number, minlength=len(probabilities)).astype(float)
    if observed[probabilities == 0].any():
        return 0.0
    expected = probabilities * len(answers)
    sparse = expected < SMALLEST_CELL
    observed = np.append(observed[~sparse], observed[sparse].sum())
    expected = np.append(expected[~sparse], expected[sparse].sum())
    full = expected > 0
    observed, expected = observed[full], expected[full]
    seen = observed > 0
    g = 2.0 * np.sum(observed[seen] * np.log(observed[seen] / expected[seen]))
    return float(stats.chi2.sf(g, df=len(expected) - 1))
