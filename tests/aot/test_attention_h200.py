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


@pytest.mark.parametrize("case", ["pro", "pro_1", "pro_16", "flash", "nano"])
def test_a_window_layers_block_is_one_launch_without_spills(case):
    found = report(f"attention_cases:block_ring_{case}")
    assert [kernel.name for kernel in found.kernels] == ["attention_ring_block"]
    assert found.kernels[0].spilled_bytes == 0
    assert found.launches == 1
    everything = sum(found.graphs, [*found.outside])
    assert [kind for kind in everything if kind != "kCommandBuffer"] == ["kCustomCall"]


@pytest.mark.parametrize("case", ["pro", "flash", "nano"])
def test_a_full_layers_block_is_three_launches_without_spills(case):
    found = report(f"attention_cases:block_long_{case}")
    names = sorted(kernel.name for kernel in found.kernels)
    assert names == ["attention_chunks", "attention_combine", "attention_turn"]
    assert not any(kernel.spilled_bytes for kernel in found.kernels)
    everything = sum(found.graphs, [*found.outside])
    assert [kind for kind in everything if kind != "kCommandBuffer"] == ["kCustomCall"] * 3


@pytest.mark.parametrize(("case", "launches"), [("rings", 1), ("long", 3)])
def test_blocks_in_a_loop_write_their_caches_in_place(case, launches):
    """Nothing but kernels, and what joins a layer's output to the next one's input, one a layer."""
    found = report(f"attention_cases:block_{case}_in_a_loop")
    assert found.launches == launches * LAYERS and len(found.kernels) == launches
    assert not found.outside and len(found.graphs) == 1
    before, body = " ".join(found.graphs[0]).split("kWhile")
    assert body.split().count("kCustomCall") == launches * LAYERS
    assert "kCopy" not in body and "Memcpy" not in body
    # The loop's condition and counter, and its caller's arrays that are not donated.
    assert len(body.split()) <= (launches + 1) * LAYERS + 3
    assert len(before.split()) <= 3


@pytest.mark.parametrize("case", ["pro", "pro_16", "flash", "nano"])
def test_a_drafters_block_is_one_launch_without_spills(case):
    found = report(f"attention_cases:draft_{case}")
    assert [kernel.name for kernel in found.kernels] == ["attention_draft"]
    assert found.kernels[0].spilled_bytes == 0
    assert found.launches == 1


def test_a_drafters_contexts_are_written_in_place():
    found = report("attention_cases:context_pro")
    assert [kernel.name for kernel in found.kernels] == ["attention_context"]
    assert found.kernels[0].spilled_bytes == 0
    assert found.launches == 1 and not found.temporaries
    assert found.outside == ["kCustomCall"]
