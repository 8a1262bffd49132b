"""What the compilers make of router and experts in one launch for an H200, where there is none."""

import h200
import pytest
from h200 import report
from moe_cases import LAYERS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]


@pytest.mark.parametrize(
    ("case", "most"), [("pro", 100), ("pro_one", 100), ("nano", 100), ("flash", 600)]
)
def test_the_kernel_spills_little(case, most):
    """Counters of loops, and of Flash's sixteen warps, which have fewer registers, more of them."""
    found = report(f"moe_cases:{case}")
    assert [kernel.name for kernel in found.kernels] == ["moe_layer"]
    assert found.kernels[0].spilled_bytes < most
    assert found.launches == 1


def test_layers_in_a_loop_are_one_graph_of_one_compile():
    found = report("moe_cases:loop")
    assert len(found.kernels) == 1 and found.lowered == 1
    assert not found.outside and len(found.graphs) == 1
    rounds = found.graphs[0][found.graphs[0].index("kWhile") + 1 :]
    assert rounds.count("kCustomCall") == found.launches == LAYERS
