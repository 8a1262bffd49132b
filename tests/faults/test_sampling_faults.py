"""Bugs planted in the rule that accepts drafts: the distribution test must fail with each."""

import jax.numpy as jnp
import pytest
from decode.exact import g_test, joint, make_decoder, samples

from mimo_jax.decode import loop

ACCEPT, COMMIT, CHOOSE = loop.accept, loop._commit, loop.choose


def off_by_one(monkeypatch):
    """One more token than agreed: a sample that follows a refused draft is kept."""

    def accept(block, chosen, room, request):
        count, ended = ACCEPT(block, chosen, room, request)
        return jnp.minimum(jnp.minimum(count + 1, block.shape[1]), room), ended

    monkeypatch.setattr(loop, "accept", accept)


def bonus_from_the_wrong_row(monkeypatch):
    """The free token comes from the slot after the one whose logits belong to it."""

    def commit(state, chosen, count, ended, counted):
        last = jnp.maximum(count - 1, 0)[:, None]
        after = jnp.minimum(last + 1, chosen.shape[1] - 1)
        wrong = jnp.take_along_axis(chosen, after, axis=1)
        slots = jnp.arange(chosen.shape[1])
        chosen = jnp.where(slots == last, wrong, chosen)
        return COMMIT(state, chosen, count, ended, counted)

    monkeypatch.setattr(loop, "_commit", commit)


def drafts_kept_unchecked(monkeypatch):
    """Every draft is emitted as it is, whatever the target says."""
    blocks = []

    def accept(block, chosen, room, request):
        blocks.append(block)
        return jnp.minimum(request.max_draft + 1, room), jnp.zeros(room.shape, bool)

    def commit(state, chosen, count, ended, counted):
        drafted = jnp.concatenate([blocks[-1][:, 1:], chosen[:, -1:]], axis=1)
        return COMMIT(state, drafted, count, ended, counted)

    monkeypatch.setattr(loop, "accept", accept)
    monkeypatch.setattr(loop, "_commit", commit)


@pytest.mark.parametrize(
    "plant",
    [
        drafts_kept_unchecked,
        pytest.param(off_by_one, marks=pytest.mark.slow),
        pytest.param(bonus_from_the_wrong_row, marks=pytest.mark.slow),
    ],
)
def test_distribution_catches(plant, monkeypatch):
    plant(monkeypatch)
    decoder = make_decoder()
    answers, _ = samples(decoder, temperature=1.0)
    assert g_test(answers, joint(decoder, temperature=1.0)) < 1e-3
