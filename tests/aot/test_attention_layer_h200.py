"""What the compilers make of the attention layer for an H200, on a machine that has none."""

import h200
import pytest
from h200 import report
from layer_cases import LAYERS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]


@pytest.mark.parametrize("case", ["pro", "pro_one", "pro_part", "pro_fp8", "flash"])
def test_the_kernel_spills_next_to_nothing(case):
    found = report(f"layer_cases:{case}")
    assert [kernel.name for kernel in found.kernels] == ["attention_layer"]
    assert found.kernels[0].spilled_bytes <= {"pro_one": 64, "pro": 8, "pro_part": 8}.get(case, 0)
    assert found.launches == 1


def test_layers_in_a_loop_are_one_graph_of_one_compile():
    found = report("layer_cases:loop")
    assert len(found.kernels) == 1 and found.lowered == 1
    assert not found.outside and len(found.graphs) == 1
    rounds = found.graphs[0][found.graphs[0].index("kWhile") + 1 :]
    # A layer is the kernel and XLA's addition to the stream: no cache is copied.
    assert rounds.count("kCustomCall") == found.launches == LAYERS
    assert set(rounds) == {"kCustomCall", "kCustomKernel"}
