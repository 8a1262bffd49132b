"""What the compilers make of the few-token linear for an H200, on a machine that has none."""

import h200
import pytest
from h200 import report

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]


@pytest.mark.parametrize("case", ["qkv", "qkv_norm", "o", "o_16", "o_fp8", "head", "nano"])
def test_the_kernel_does_not_spill_and_is_all_there_is(case):
    found = report(f"linear_cases:{case}")
    assert [kernel.name for kernel in found.kernels] == ["linear"]
    assert found.kernels[0].spilled_bytes == 0
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
