"""Prompts that a target answers for its drafter: how long they are, and where they are cut."""

import numpy as np
import pytest

from mimo_jax.errors import MimoError
from mimo_jax.train.distill import Answers, _prompts
from mimo_jax.train.sources import Tokens

END = 97
LENGTH = 40


def answers(prompt):
    return Answers(
        rows=6, length=LENGTH, prompt=prompt, batch=3, greedy=0.5, coldest=0.3, hottest=1.0, seed=5
    )


@pytest.mark.parametrize("share", [0.3, 0.5, 0.85])
def test_pieces_of_text_take_an_eighth_to_the_share(share, rng):
    ids = rng.integers(0, 90, 611).astype(np.uint16)
    draw = _prompts(Tokens(ids, np.ones(611, bool)), answers(share), END)
    drawn = [draw(rng) for _ in range(900)]
    lengths = {len(piece) for piece in drawn}
    assert lengths == set(range(LENGTH // 8, int(LENGTH * share) + 1))
    windows = {tuple(window) for window in np.lib.stride_tricks.sliding_window_view(ids, 5)}
    assert all(tuple(piece[:5]) in windows for piece in drawn)


def test_chats_are_cut_before_an_answer_that_the_share_leaves_room_for(rng):
    short, long = rng.integers(0, 90, (2, 31)).astype(np.uint16)
    ids = np.concatenate([short, [END], long, [END]])
    trained = np.zeros(len(ids), bool)
    trained[11:31], trained[32 + 23 :] = True, True
    only_short, both = (_prompts(Tokens(ids, trained), answers(s), END) for s in (0.5, 0.7))
    assert {tuple(only_short(rng)) for _ in range(50)} == {tuple(short[:11])}
    assert {tuple(both(rng)) for _ in range(50)} == {tuple(short[:11]), tuple(long[:23])}
    with pytest.raises(MimoError, match=r"more than 8 tokens .* drafter.own_prompt=0.2 of"):
        _prompts(Tokens(ids, trained), answers(0.2), END)
