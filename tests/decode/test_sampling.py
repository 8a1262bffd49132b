"""The rule that accepts drafts, and noise, against slow plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_request

from mimo_jax.decode.sampling import accept, argmax, choose
from mimo_jax.sharding import Parallel

run_choose = jax.jit(choose, static_argnums=3)


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


def test_noise_depends_on_seed_sequence_and_position_alone(rng):
    w = 50
    logits = np.repeat(rng.standard_normal((1, 1, w)), 40, axis=1).astype(np.float32)
    logits = jnp.asarray(np.repeat(logits, 3, axis=0))
    start = np.array([5, 9, 5])
    positions = jnp.asarray(start[:, None] + np.arange(40), jnp.int32)
    request = make_request(3, limit=9, temperature=1.0, seed=7, sequence=[4, 4, 6])
    drawn = np.asarray(run_choose(logits, positions, request, Parallel()))
    np.testing.assert_array_equal(drawn[0, 4:], drawn[1, :-4])  # Same sequence, other slots.
    assert (drawn[0] != drawn[2]).mean() > 0.5
    assert len(np.unique(drawn[0])) > 5
    other = make_request(3, limit=9, temperature=1.0, seed=8, sequence=[4, 4, 6])
    assert (drawn != np.asarray(run_choose(logits, positions, other, Parallel()))).mean() > 0.5


def test_greedy_and_sampled_sequences_share_a_batch(rng):
    logits = jnp.asarray(rng.standard_normal((3, 6, 33)), jnp.float32)
    positions = jnp.asarray(rng.integers(0, 99, (3, 1)) + np.arange(6), jnp.int32)
    request = make_request(3, limit=9, temperature=[0.0, 1.0, 0.0], seed=3)
    mixed = np.asarray(run_choose(logits, positions, request, Parallel()))
    greedy = np.argmax(np.asarray(logits), axis=-1)
    np.testing.assert_array_equal(mixed[[0, 2]], greedy[[0, 2]])
    warm = make_request(3, limit=9, temperature=1.0, seed=3)
    drawn = run_choose(logits, positions, warm, Parallel())
    np.testing.assert_array_equal(mixed[1], drawn[1])


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
