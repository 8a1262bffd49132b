"""The exchanges' own PTX, on a machine that delivers stores late and in any order."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from ptx_machine import Memory, Trap, parse, run, thread

from pallas_kernels.all_sum.mail import EMPTY, Mail
from pallas_kernels.all_sum.ptx import Exchange, opening

PATIENCE = 200_000


def open_boxes(memory: Memory, mail: Mail) -> list[int]:
    """Mailboxes as XLA fills them and the opening launch leaves them."""
    words = np.where(np.arange(mail.words) < mail.slots, 0, EMPTY)
    boxes = [memory.place(device, words) for device in range(mail.devices)]
    program = parse(opening(mail.devices))

    def launch(device):
        operands = [boxes[device], device, *boxes]
        return lambda: [thread(memory, device, t, program, operands) for t in range(2)]

    run(memory, [[launch(device)] for device in range(mail.devices)])
    return boxes


def play(rng, mail, exchanges, favourite=None, spoil=str):
    """Makes exchanges of random words; returns what went in, [exchange, device], and came out."""
    memory = Memory(rng)
    boxes = open_boxes(memory, mail)
    inputs, places, launches = [], [], [[] for _ in boxes]
    for exchange in exchanges:
        words = [draw(rng, exchange) for _ in boxes]
        added = [draw(rng, exchange)] if exchange.residual else []
        size = exchange.words * (1 if exchange.total else mail.devices)
        program = parse(spoil(exchange.program()))
        inputs.append([*words, *added])
        places.append([memory.place(device, np.zeros(size)) for device in range(len(boxes))])
        for device, box in enumerate(boxes):
            at = memory.place(device, words[device]), box, places[-1][device], 0
            at = *at, *(memory.place(device, residual) for residual in added)

            def launch(device=device, at=at, program=program, threads=exchange.threads):
                # Some threads more than have something to do.
                return [thread(memory, device, t, program, at) for t in range(threads + 1)]

            launches[device].append(launch)
    run(memory, launches, favourite)
    assert not memory.flying
    found = [
        [memory.array(at, exchange.words * (1 if exchange.total else mail.devices)) for at in row]
        for exchange, row in zip(exchanges, places, strict=True)
    ]
    return inputs, found


def draw(rng, exchange: Exchange) -> np.ndarray:
    """Words of an array; among integers are those that an empty slot holds."""
    if exchange.kind == "b32":
        return rng.choice([0, 1, EMPTY, 0xFFFF, 0xFFFF0000, 12345], exchange.words).astype(
            np.uint32
        )
    if exchange.kind == "f32":
        return rng.standard_normal(exchange.words).astype(np.float32).view(np.uint32)
    return rng.standard_normal(2 * exchange.words).astype(ml_dtypes.bfloat16).view(np.uint32)


def meaning(exchange: Exchange, words: list[np.ndarray]) -> np.ndarray:
    """The result, by numpy; the last of the words is the residual, if there is one."""
    if not exchange.total:
        return np.concatenate(words)
    if exchange.kind == "b32":
        return np.sum(words, axis=0, dtype=np.uint32)
    dtype = np.float32 if exchange.kind == "f32" else ml_dtypes.bfloat16
    total, *rest = [each.view(dtype).astype(np.float32) for each in words]
    for part in rest:
        total = total + part
    return total.astype(dtype).view(np.uint32)


def check(exchanges, inputs, found):
    for exchange, words, results in zip(exchanges, inputs, found, strict=True):
        for result in results:
            np.testing.assert_array_equal(result, meaning(exchange, words), str(exchange))


def exchange_of(mail, rng, kind=None):
    kind = kind or rng.choice(["f32", "bf16", "b32"])
    total, words = bool(rng.integers(2)), int(rng.integers(1, 13))
    return Exchange(mail, words, str(kind), total, total and bool(rng.integers(2)), PATIENCE)


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize(("total", "residual"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("kind", ["f32", "bf16", "b32"])
def test_every_kind_on_every_number_of_devices(devices, total, residual, kind, rng):
    mail = Mail(devices, 128)
    exchanges = [Exchange(mail, words, kind, total, residual, PATIENCE) for words in (8, 3)]
    check(exchanges, *play(rng, mail, exchanges))


@pytest.mark.parametrize("favourite", [None, 0, 1])
def test_many_exchanges_of_all_sizes_while_one_device_runs_ahead(favourite, rng):
    mail = Mail(3, 128)
    exchanges = [exchange_of(mail, rng) for _ in range(60)]
    check(exchanges, *play(rng, mail, exchanges, favourite))


def test_the_places_of_two_blocks_threads_do_not_meet():
    mail = Mail.holding(2, 3000)
    assert mail.threads == 256 and Mail.of(mail.words, 2) == mail
    places = {mail.slot(p, s, t) for p in range(2) for s in range(2) for t in range(256)}
    assert len(places) == 4 * 256 and min(places) == mail.slots
    assert max(places) + 4 == mail.words and all(place % 4 == 0 for place in places)


def test_words_that_are_no_mailbox_are_refused():
    with pytest.raises(ValueError, match="1000 words are no mailbox"):
        Mail.of(1000, 4)


def test_a_nan_that_looks_like_an_empty_slot_arrives_as_a_nan(rng):
    mail = Mail(2, 128)
    for kind, dtype in (("f32", np.float32), ("bf16", ml_dtypes.bfloat16)):
        exchange = Exchange(mail, 1, kind, True, patience=PATIENCE)
        program = parse(exchange.program())
        memory = Memory(rng)
        boxes = open_boxes(memory, mail)
        out = [memory.place(device, [0]) for device in range(2)]

        def launch(device, memory=memory, boxes=boxes, out=out, program=program):
            at = memory.place(device, [EMPTY]), boxes[device], out[device], 0
            return lambda: [thread(memory, device, 0, program, at)]

        run(memory, [[launch(0)], [launch(1)]])
        for device in range(2):
            assert np.isnan(memory.array(out[device], 1).view(dtype).astype(np.float32)).all()


def test_a_mailbox_that_was_moved_is_noticed(rng):
    mail = Mail(2, 128)
    memory = Memory(rng)
    boxes = open_boxes(memory, mail)
    moved = memory.place(0, memory.read(boxes[0], mail.words))
    program = parse(Exchange(mail, 4, "f32", True, patience=PATIENCE).program())
    at = memory.place(0, [0] * 4), moved, memory.place(0, [0] * 4), 0
    with pytest.raises(Trap):
        list(thread(memory, 0, 0, program, at))


def test_a_device_that_never_comes_is_given_up(rng):
    mail = Mail(2, 128)
    memory = Memory(rng)
    boxes = open_boxes(memory, mail)
    exchange = Exchange(mail, 4, "f32", True, patience=50)
    at = memory.place(0, [0] * 4), boxes[0], memory.place(0, [0] * 4), 0
    with pytest.raises(Trap):
        list(thread(memory, 0, 0, parse(exchange.program()), at))


@pytest.mark.parametrize(
    "spoiled",
    [
        ("and.b32 phase, count, 1;", "mov.b32 phase, 0;"),
        ("mov.b32 e, 4294967295;", "mov.b32 e, 0;"),
        ("mad.lo.u32 slot, phase, 3, rank;", "mad.lo.u32 slot, phase, 3, 0;"),
    ],
)
def test_a_protocol_that_is_wrong_is_found_out(spoiled, rng):
    """One phase instead of two; slots that are not made empty; senders that share a slot."""
    mail = Mail(3, 128)
    exchanges = [
        dataclasses.replace(exchange_of(mail, rng, "f32"), patience=2000) for _ in range(60)
    ]

    def spoil(text):
        assert spoiled[0] in text
        return text.replace(*spoiled)

    with pytest.raises((AssertionError, Trap)):
        check(exchanges, *play(rng, mail, exchanges, 0, spoil))
