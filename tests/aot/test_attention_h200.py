"""What the compilers make of decode attention for an H200, on a machine that has none."""

import h200
import pytest
from h200 import report

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]
LAYERS = 6


@pytest.mark.parametrize("case", ["pro", "nano"])
def test_a_ring_is_one_launch_without_spills(case):
    found = report(f"attention_cases:ring_{case}")
    assert [kernel.name for kernel in found.kernels] == ["attention_ring"]
    assert found.kernels[0].spilled_bytes == 0
    assert found.launches == 1


@pytest.mark.parametrize("case", ["pro", "pro_1", "pro_16", "flash", "nano"])
def test_a_long_cache_is_two_launches_without_spills(case):
    found = report(f"attention_cases:long_{case}")
    names = sorted(kernel.name for kernel in found.kernels)
    assert names == ["attention_chunks", "attention_combine"]
    assert not any(kernel.spilled_bytes for kernel in found.kernels)
    assert found.launches == 2


@pytest.mark.parametrize(("case", "launches"), [("rings", 1), ("long", 2)])
def test_layers_in_a_loop_are_one_graph_of_one_compile(case, launches):
    found = report(f"attention_cases:{case}_in_a_loop")
    assert found.launches == launches * LAYERS and len(found.kernels) == launches
    assert not found.outside and len(found.graphs) == 1
    assert found.graphs[0].count("kCustomCall") == launches * LAYERS
