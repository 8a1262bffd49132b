"""The kernel's weight order: invertible, and each nibble where a slow plain oracle says it goes."""

import numpy as np
import pytest

from pallas_kernels.expert_ffn import layout

SHAPES = [(192, 768, 12, 3), (384, 128, 12, 1), (96, 256, 4, 2), (32, 1024, 8, 2)]


def random_matrix(rng, experts, rows, columns):
    codes = rng.integers(0, 256, (experts, rows, columns // 2), dtype=np.uint8)
    return codes, rng.integers(0, 255, (experts, rows, columns // 32), dtype=np.uint8)


def make_plan(rows, columns, warps, parts):
    column_warps = next(
        n for n in (4, 3, 2, 1) if columns % (n * parts * 64) == 0 and warps % n == 0
    )
    return layout.Plan(rows, columns, warps // column_warps, column_warps, parts)


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_invertible(shape):
    rng = np.random.default_rng()
    plan = make_plan(*shape)
    codes, scales = random_matrix(rng, 3, *shape[:2])
    packed = layout.pack(codes, scales, plan)
    assert packed.shape == (3, *plan.packed_shape)
    assert packed.nbytes == codes.nbytes + scales.nbytes
    again = layout.unpack(packed, plan)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(again[1], scales)


def test_each_nibble_lies_where_its_lane_takes_it():
    rng = np.random.default_rng()
    plan = make_plan(192, 768, 12, 3)
    codes, scales = random_matrix(rng, 1, 192, 768)
    words = layout.pack(codes, scales, plan).reshape(plan.units, plan.parts, plan.stage_words)
    # Of sign and magnitude, the greatest bit first.
    places = {
        (0, 0): (15, 8, 7, 6),
        (0, 1): (5, 30, 29, 28),
        (1, 0): (2, 27, 26, 25),
        (1, 1): (1, 0, 4, 3),
    }
    for _ in range(500):
        row, column = int(rng.integers(192)), int(rng.integers(768))
        unit, row_in_unit = divmod(row, 16 * plan.row_warps)
        tile, row16 = divmod(row_in_unit, 16)
        half, g = divmod(row16, 8)
        piece, in_slice = divmod(column, plan.slice_columns)
        part, in_part = divmod(in_slice, plan.part_columns)
        group, rest = divmod(in_part, 64)
        block, rest = divmod(rest, 32)
        c, rest = divmod(rest, 8)
        step, rest = divmod(rest, 4)
        a, odd = divmod(rest, 2)
        warp = tile * plan.column_warps + piece
        lane = 4 * g + c
        index = ((warp * (plan.part_columns // 64) + group) * 32 + lane) * 4 + 2 * block + step
        word = int(words[unit, part, index])
        bits = [word >> (place + 16 * odd) % 32 & 1 for place in places[a, half]]
        found = int("".join(map(str, bits)), 2)
        assert found == codes[0, row, column // 2] >> (4 * (column % 2)) & 15
        at = ((warp * 8 + g) * 2 + half) * (plan.part_columns // 32) + in_part // 32
        byte = int(words[unit, part, plan.code_words + at // 4]) >> (8 * (at % 4)) & 255
        assert byte == scales[0, row, column // 32]


def test_gate_and_up_rows_alternate_by_eight():
    rows = np.arange(2 * 24).reshape(1, 2, 24, 1)
    mixed = layout.interleave(rows)
    assert list(mixed[0, :16, 0]) == [*range(8), *range(24, 32)]
    np.testing.assert_array_equal(layout.deinterleave(mixed), rows)


def test_real_shapes_have_plans():
    for rows, columns in (
        (512, 6144),
        (6144, 256),
        (4096, 6144),
        (6144, 2048),
        (4096, 4096),
        (4096, 2048),
        (512, 4096),
        (4096, 256),
        (512, 256),
        (256, 256),
    ):
        plan = layout.plan_for(rows, columns)
        assert plan.slice_columns <= 512 and plan.stage_shape[0] <= 256
    with pytest.raises(ValueError, match="No plan"):
        layout.plan_for(512, 96)
