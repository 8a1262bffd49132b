"""What the compilers make of our programs for an H200, on a machine that has none."""

import cases
import h200
import pytest
from h200 import report

from mimo_jax.planning.sizes import abstract_mesh, workspace_of

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]
KERNELS = ["expert_down", "expert_gate_up"]
LAYERS = 24
MOST_SPILLED, MOST_SPILLED_OF_TWO = 100, 75


@pytest.mark.parametrize("case", ["pro_tp8", "pro", "nano", "prefill"])
def test_two_launches_hardly_spill(case):
    """With more than 8 tokens."""
    found = report(f"kernel_{case}")
    assert sorted(kernel.name for kernel in found.kernels) == KERNELS
    assert all(kernel.spilled_bytes < MOST_SPILLED_OF_TWO for kernel in found.kernels)
    assert all(0 < kernel.registers <= 168 for kernel in found.kernels)
    assert not found.outside


@pytest.mark.parametrize("case", ["pro_tp8", "pro_tp8_stream", "pro", "flash_tp8", "nano"])
def test_one_launch_is_all_there_is(case):
    """It makes its own work list and adds up its own results; nothing clears its barrier.

    What it spills are counters of loops, once a unit of work, not of the loop over a unit.
    """
    found = report(f"one_{case}")
    assert [kernel.name for kernel in found.kernels] == ["expert_ffn"]
    assert found.kernels[0].spilled_bytes < MOST_SPILLED
    assert found.launches == 1
    assert [*sum(found.graphs, []), *found.outside] == ["kCustomCall"]


def test_one_launch_a_layer_in_a_loop_is_one_graph_of_one_compile():
    found = report("layers_in_one_launch_each")
    assert found.launches == LAYERS and found.lowered == 1
    assert [kernel.name for kernel in found.kernels] == ["expert_ffn"]
    assert not found.outside and len(found.graphs) == 1
    assert found.graphs[0].count("kCustomCall") == LAYERS


def test_many_layers_in_a_loop_are_one_graph_of_one_trace_and_one_compile():
    found = report("layers_in_a_loop")
    assert found.launches == len(KERNELS) * LAYERS
    assert found.counters == {"traced": len(KERNELS)}
    assert found.lowered == len(KERNELS)
    assert sorted(kernel.name for kernel in found.kernels) == KERNELS
    assert not found.outside and len(found.graphs) == 1
    assert found.graphs[0].count("kWhile") == 1
    assert found.graphs[0].count("kCustomCall") == found.launches


def test_without_our_options_the_host_runs_the_loop():
    found = report("layers_without_options")
    assert "kWhile" in found.outside


def test_eight_devices_launch_the_same_two_kernels():
    found = report("layers_in_a_loop", devices=8)
    assert sorted(kernel.name for kernel in found.kernels) == KERNELS
    assert found.launches == len(KERNELS) * LAYERS


def test_auto_becomes_the_kernel_without_a_branch():
    found = report("auto_in_a_program")
    assert found.launches == 1
    assert not {"kConditional", "kWhile"} & {kind for graph in found.graphs for kind in graph}


@pytest.mark.parametrize("case", ["decode_nano", "decode_nano_mtp"])
def test_the_decode_program_is_one_graph(case):
    found = report(case)
    assert not found.outside and len(found.graphs) == 1
    assert found.graphs[0].count("kWhile") >= 2


def test_the_decode_program_with_the_kernel_is_one_graph():
    """Two kernels for prefill; one for blocks of 8, for each kind of what is brought near."""
    found = report("decode_nano_kernel")
    assert not found.outside and len(found.graphs) == 1
    experts = [kernel.name for kernel in found.kernels if kernel.name.startswith("expert")]
    assert sorted(experts) == sorted([*["expert_ffn"] * 3, *KERNELS])
    assert found.lowered == len(found.kernels)


@pytest.mark.parametrize(("case", "max_len"), [("short", 4096), ("long", 131072)])
def test_the_plan_estimates_the_temporaries(case, max_len):
    placed, settings = cases.wide(abstract_mesh(8), max_len)
    estimate = sum(workspace_of(placed, settings).values())
    found = report(f"decode_wide_{case}", devices=8)
    print(f"estimated {estimate:,}, XLA's {found.temporaries:,}")
    assert 0.8 < estimate / found.temporaries < 1.7


def test_a_kernel_that_spills_is_seen(tmp_path):
    (tmp_path / "expert_down_0.ptxas").write_text(
        "ptxas warning : Registers are spilled, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info: Compiling entry function 'k' for 'sm_90a'\n"
        "    0 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info: Used 168 registers, used 1 barriers\n"
    )
    assert h200.read_kernels(str(tmp_path)) == [h200.Kernel("expert_down", 168, 12)]
