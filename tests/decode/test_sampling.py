"""The rule that accepts drafts, truncation and noise, against slow plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_request

from mimo_jax.decode.sampling import accept, argmax, choose, sample, truncate
from mimo_jax.sharding import Parallel


def accept_slowly(block, chosen, room, max_draft, eos):
    """Tokens emitted by one sequence, and whether it ends with them."""
    kept = []
    for slot, token in enumerate(chosen):
        kept.append(token)
        if len(kept) >= room or token in eos:
            break
        following = slot + 1
        if following >= len(block) or following > max_draft or block[following] != token:
            break
    kept = kept[:room]
    return len(kept), bool(kept) and kept[-1] in eos


def test_accept(rng):
    ended = 0
    run = jax.jit(accept)
    for number in range(300):
        b, t = [(1, 2), (3, 5), (2, 8), (4, 1), (1, 16)][number % 5]
        vocab = int(rng.choice([2, 3, 6]))
        block = rng.integers(0, vocab, (b, t)).astype(np.int32)
        chosen = rng.integers(0, vocab, (b, t)).astype(np.int32)
        copied = rng.random((b, t - 1)) < 0.7
        block[:, 1:] = np.where(copied, chosen[:, :-1], block[:, 1:])
        room = rng.integers(0, t + 3, b).astype(np.int32)
        max_draft = int(rng.integers(t))
        eos = rng.integers(0, 2 * vocab, rng.integers(0, 3))
        request = make_request(b, limit=9, max_draft=max_draft, eos=eos)
        count, end = run(jnp.asarray(block), jnp.asarray(chosen), jnp.asarray(room), request)
        expected = [
            accept_slowly(*row, max_draft, eos.tolist())
            for row in zip(block.tolist(), chosen.tolist(), room.tolist(), strict=True)
        ]
        assert list(zip(count.tolist(), end.tolist(), strict=True)) == expected
        ended += int(end.sum())
    assert ended > 20  # About 110, give or take 11.


def truncate_slowly(logits, top_p, top_k):
    """Which tokens stay, of one row; and whether rounding or a tie could change that."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: top_k or len(logits)]
    weights = np.exp(np.array([logits[token] for token in order], np.float64) - max(logits))
    weights /= weights.sum()
    stay, mass = set(), 0.0
    for token, weight in zip(order, weights, strict=True):
        if mass >= top_p and top_p < 1.0 and stay:
            break
        stay.add(token)
        mass += weight
    close = top_p < 1.0 and np.abs(np.cumsum(weights) - top_p).min() < 1e-5
    return stay, close or len(set(logits.tolist())) < len(logits)


def test_truncate(rng):
    compared = 0
    run = jax.jit(truncate)
    for number in range(200):
        b, t, w = [(1, 2, 3), (3, 4, 39), (2, 5, 8), (2, 1, 17)][number % 4]
        logits = rng.choice([0.3, 2.0, 8.0]) * rng.standard_normal((b, t, w))
        logits = logits.astype(np.float32)
        top_p = rng.choice([0.05, 0.5, 0.9, 0.999, 1.0], b).astype(np.float32)
        top_k = rng.choice([0, 1, 2, 7, 1000], b).astype(np.int32)
        out = np.asarray(run(jnp.asarray(logits), jnp.asarray(top_p), jnp.asarray(top_k)))
        kept = np.isfinite(out)
        np.testing.assert_array_equal(out[kept], logits[kept])
        for i, j in np.ndindex(b, t):
            stay, close = truncate_slowly(logits[i, j], top_p[i], top_k[i])
            if not close:
                assert set(np.flatnonzero(kept[i, j])) == stay
                compared += 1
    assert compared > 1000  # Of 1300.


def test_truncate_keeps_ties_and_always_one():
    logits = jnp.asarray([[[1.0, 3.0, 3.0, 0.0]]])
    one, none = jnp.ones(1, jnp.int32), jnp.zeros(1, jnp.int32)
    kept = jnp.isfinite(truncate(logits, jnp.ones(1), one))
    assert kept.tolist() == [[[False, True, True, False]]]
    kept = jnp.isfinite(truncate(jnp.asarray([[[1.0, 3.0, 2.0]]]), jnp.zeros(1), none))
    assert kept.tolist() == [[[False, True, False]]]


def test_noise_depends_on_seed_sequence_and_position_alone(rng):
    w = 50
    logits = np.repeat(rng.standard_normal((1, 1, w)), 40, axis=1).astype(np.float32)
    logits = jnp.asarray(np.repeat(logits, 3, axis=0))
    start = np.array([5, 9, 5])
    positions = jnp.asarray(start[:, None] + np.arange(40), jnp.int32)
    request = make_request(3, limit=9, temperature=1.0, seed=7, sequence=[4, 4, 6])
    run = jax.jit(sample)
    drawn = np.asarray(run(logits, positions, request))
    np.testing.assert_array_equal(drawn[0, 4:], drawn[1, :-4])  # Same sequence, other slots.
    assert (drawn[0] != drawn[2]).mean() > 0.5
    assert len(np.unique(drawn[0])) > 5
    other = make_request(3, limit=9, temperature=1.0, seed=8, sequence=[4, 4, 6])
    assert (drawn != np.asarray(run(logits, positions, other))).mean() > 0.5


def test_greedy_and_sampled_sequences_share_a_batch(rng):
    logits = jnp.asarray(rng.standard_normal((3, 6, 33)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 99, (3, 1)) + np.arange(6), jnp.int32)
    request = make_request(3, limit=9, temperature=[0.0, 1.0, 0.0], seed=3)
    mixed = np.asarray(jax.jit(choose, static_argnums=3)(logits, positions, request, Parallel()))
    greedy = np.argmax(np.asarray(logits), axis=-1)
    np.testing.assert_array_equal(mixed[[0, 2]], greedy[[0, 2]])
    np.testing.assert_array_equal(mixed[1], jax.jit(sample)(logits, positions, request)[1])


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_argmax_over_shards_takes_the_lowest_of_equals(devices, rng):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("model",))
    split, whole = jax.sharding.PartitionSpec(None, None, "model"), jax.sharding.PartitionSpec()
    run = jax.jit(
        jax.shard_map(
            lambda logits: argmax(logits, Parallel("model")),
            mesh=mesh,
            in_specs=split,
            out_specs=whole,
            check_vma=False,
        )
    )
    for _ in range(20):
        logits = rng.integers(0, 4, (2, 3, 24)).astype(np.float32)
        np.testing.assert_array_equal(run(logits), np.argmax(logits, axis=-1))
