"""What the compilers make of prefill attention for an H200, on a machine that has none."""

import h200
import pytest
from h200 import report

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]
CASES = ("full_pro", "window_pro", "full_flash", "full_nano", "window_nano")


@pytest.mark.parametrize("case", CASES)
def test_a_chunk_is_one_launch_without_spills(case):
    found = report(f"prefill_cases_h200:{case}")
    assert [kernel.name for kernel in found.kernels] == ["prefill_attention"]
    assert found.kernels[0].spilled_bytes == 0
    assert found.launches == 1


def test_three_warpgroups_hardly_spill():
    """A way to launch that benchmarks try; a few words."""
    found = report("prefill_cases_h200:full_pro_3")
    assert found.launches == 1 and found.kernels[0].spilled_bytes <= 64


def test_a_key_value_heads_stack_is_not_copied():
    """One key/value head a rank: what is in memory besides are the rows' sinks."""
    assert report("prefill_cases_h200:full_pro").temporaries < 1 << 20


def test_the_benchmarks_program_is_one_graph():
    """Layers of a rank of eight, one without a window, 256 K tokens, chunks of 2,048."""
    found = report("prefill_cases_h200:rank_pro")
    assert len(found.graphs) == 1 and not found.outside
    names = [kernel.name for kernel in found.kernels]
    assert names.count("prefill_attention") == 2
    assert found.temporaries < 1 << 30


def test_layers_of_a_kind_are_one_compile_without_scores():
    """The model's own way to it, for a chunk of 2,048 rows and 256 K positions."""
    found = report("prefill_cases_h200:layers_pro")
    assert found.launches == 4 and len(found.kernels) == 2
    assert found.temporaries < 64 << 20
