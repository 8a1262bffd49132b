"""What the compilers make of the few-token linear for an H200, on a machine that has none."""

import h200
import pytest
from h200 import report

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]


@pytest.mark.parametrize(
    ("case", "once"),
    [
        ("qkv", True),
        ("qkv_norm", True),
        ("o", True),
        ("o_16", True),
        ("o_fp8", True),
        ("head", False),
        ("nano", True),
    ],
)
def test_the_kernel_does_not_spill_and_is_all_there_is(case, once):
    found = report(f"linear_cases:{case}")
    assert [kernel.name for kernel in found.kernels] == ["linear"]
    assert found.kernels[0].spilled_bytes == 0
    # Only a ring that is used again is handed back to the copy engine.
    assert (found.kernels[0].proxy_fences == 0) == once
    assert [*sum(found.graphs, []), *found.outside] == ["kCustomCall"]


@pytest.mark.parametrize("case", ["qkv_16", "flash_qkv_16"])
def test_sixteen_tokens_of_many_columns_are_two_launches(case):
    found = report(f"linear_cases:{case}")
    assert [kernel.spilled_bytes for kernel in found.kernels] == [0, 0]
    assert found.launches == 2


def test_columns_divided_among_blocks_are_added_by_one_kernel_of_xlas():
    found = report("linear_cases:features")
    assert [kernel.spilled_bytes for kernel in found.kernels] == [0]
    assert len([*sum(found.graphs, []), *found.outside]) == 2


def test_layers_in_a_loop_are_one_graph_of_one_compile():
    found = report("linear_cases:loop")
    assert len(found.kernels) == 1 and found.lowered == 1
    assert not found.outside and len(found.graphs) == 1
    # A layer is the kernel, its norm in it, and XLA's addition; the loop has two of its own.
    assert found.graphs[0].count("kCustomCall") == found.launches == 6
    assert found.graphs[0].count("kCustomKernel") == 6 + 2
