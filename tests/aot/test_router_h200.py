"""What the compilers make of the router for an H200, on a machine that has none."""

import h200
import pytest
from h200 import report
from router_cases_h200 import LAYERS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]


@pytest.mark.parametrize("case", ["pro", "pro_16", "pro_wide", "flash", "nano"])
def test_the_kernel_does_not_spill_and_is_all_there_is(case):
    found = report(f"router_cases_h200:{case}")
    assert [kernel.name for kernel in found.kernels] == ["router"]
    assert found.kernels[0].spilled_bytes == 0
    assert [*sum(found.graphs, []), *found.outside] == ["kCustomCall"]


def test_layers_in_a_loop_are_one_graph_of_one_compile():
    found = report("router_cases_h200:loop")
    assert len(found.kernels) == 1 and found.lowered == 1
    assert not found.outside and len(found.graphs) == 1
    rounds = found.graphs[0][found.graphs[0].index("kWhile") + 1 :]
    # A layer is the kernel and XLA's arithmetic between two of them: nothing is copied or cleared.
    assert rounds.count("kCustomCall") == found.launches == LAYERS
    assert set(rounds) == {"kCustomCall", "kCustomKernel"}
