"""The kernel's decoding instructions, executed one by one on a CPU, for all codes in all places."""

import re

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from pallas_kernels.expert_ffn import lanes, layout  # noqa: E402

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def execute(text, words):
    """Runs the few instructions that decoding uses; returns the registers."""
    registers = {"w": words.astype(np.uint32)}

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 0))

    for line in filter(None, map(str.strip, text.format(w="w").split("\n"))):
        operation, target, *names = re.fullmatch(r"(\S+) (.*);", line).expand(r"\1,\2").split(",")
        operands = [value(name.strip()) for name in names]
        registers[target.strip()] = {
            "and.b32": lambda a, b: a & b,
            "mul.lo.u32": lambda a, b: a * b,
            "shf.l.wrap.b32": lambda low, high, b: high << b | low >> np.uint32(32 - b),
        }[operation](*operands)
    return registers


def packed_words(codes):
    """Words of a 16 x 64 matrix by (group row g, lane column c, block, step)."""
    plan = layout.Plan(64, 64, 4, 1, 1)
    packed = layout.pack(codes, np.zeros((64, 2), np.uint8), plan).reshape(-1)
    return packed[: plan.code_words].reshape(4, 8, 4, 2, 2)


def test_decoding_gives_every_code_its_value(rng):
    """As pairs of bfloat16 times 2^-126, in the registers where the tensor core wants them."""
    codes = rng.integers(0, 256, (64, 32), dtype=np.uint8)
    registers = execute(lanes._DECODE, packed_words(codes))
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(64, 64)
    assert len(np.unique(nibbles)) == 16
    values = np.where(nibbles >= 8, -E2M1[nibbles & 7], E2M1[nibbles & 7])
    # tile, half, g | block, c, step, a, odd
    values = values.reshape(4, 2, 8, 2, 4, 2, 2, 2)
    for a in (0, 1):
        for half in (0, 1):
            for odd in (0, 1):
                bits = registers[f"a{2 * a + half}"] >> np.uint32(16 * odd)
                found = bits.astype(np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
                expected = values[:, half, :, :, :, :, a, odd].transpose(0, 1, 3, 2, 4)
                np.testing.assert_array_equal(found * 2.0**126, expected)


def test_a_wrong_mask_is_seen(rng):
    codes = rng.integers(0, 256, (64, 32), dtype=np.uint8)
    right, wrong = (
        execute(text, packed_words(codes))
        for text in (lanes._DECODE, lanes._DECODE.replace("0x81C081C0", "0x81C001C0", 1))
    )
    assert any((right[name] != wrong[name]).any() for name in ("a0", "a1", "a2", "a3"))
