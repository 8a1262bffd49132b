"""What the compilers make of sums over devices: one CUDA graph, and the mailbox where it was."""

import re
from collections import Counter
from pathlib import Path

import h200
import pytest
from h200 import report

from pallas_kernels.all_sum import MOST_BYTES
from pallas_kernels.all_sum.mail import Mail

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]
KERNELS = {"all_gather", "all_sum", "open_mail"}
COLLECTIVE = re.compile(r" (all-reduce|all-gather|collective-permute|all-to-all)(?:-start)?\(")


def optimised(dump: Path) -> str:
    """The largest program that XLA has left in a folder."""
    texts = [path.read_text() for path in dump.glob("*after_optimizations.txt")]
    return max(texts, key=len)


def check_mail(text: str, devices: int) -> None:
    """The mailbox is made once and then used in place: nothing else is of its size."""
    words = Mail.holding(devices, MOST_BYTES).words
    makers = Counter(re.findall(rf" = u32\[{words}\]\S* ([\w-]+)\(", text))
    assert makers["fusion"] == makers["custom-call"] == 1, makers  # Filled, and opened.
    assert not set(makers) & {"copy", "copy-start", "dynamic-update-slice", "conditional"}, makers
    calls = re.findall(rf"u32\[{words}\]\S*\) custom-call\(.*", text)
    assert calls and all("output_to_operand_aliasing={{" in call for call in calls)


@pytest.mark.parametrize("devices", [2, 8])
def test_sums_in_a_loop_are_one_graph(devices, tmp_path):
    found = report("sum_cases:mixed", devices, str(tmp_path))
    assert {kernel.name for kernel in found.kernels} == KERNELS and len(found.kernels) == 3
    assert not any(kernel.spilled_bytes for kernel in found.kernels)
    assert found.launches == 5 and found.lowered == 3
    assert not found.outside and len(found.graphs) == 1
    assert found.graphs[0].count("kCustomCall") == 5
    text = optimised(tmp_path)
    assert not COLLECTIVE.search(text)
    check_mail(text, devices)
    assert text.count("uses_xla_collective_metadata = true") == 1


@pytest.mark.parametrize("case", ["exact", "mail"])
def test_the_benchmarks_loops_are_one_graph(case):
    found = report(f"sum_cases:{case}", devices=4)
    assert not found.outside and len(found.graphs) == 1


def test_xlas_sums_are_not_in_a_graph_unless_they_are_nccls():
    assert "kCollectiveKernel" in report("sum_cases:psum", devices=4).outside
    found = report("sum_cases:nccl", devices=4)
    assert not found.outside and found.graphs[0].count("kAllReduce") == 8


@pytest.mark.parametrize(("case", "devices"), [("nano", 4), ("pro", 8)])
def test_decoding_on_several_devices_is_one_graph(case, devices, tmp_path):
    found = report(f"sum_cases:{case}", devices, str(tmp_path))
    assert not found.outside and len(found.graphs) == 1
    assert found.graphs[0].count("kWhile") >= 1
    assert not any(k.spilled_bytes for k in found.kernels if k.name in KERNELS)
    text = optimised(tmp_path)
    assert not COLLECTIVE.search(text)
    check_mail(text, devices)


def test_chunks_of_a_prompt_keep_xlas_sums_and_the_loop_its_graph(tmp_path):
    found = report("sum_cases:pro_with_prefill", 8, str(tmp_path))
    assert found.outside.count("kWhile") == 1
    assert "kCollectiveKernel" in found.outside
    loop = max(found.graphs, key=len)
    assert loop.count("kWhile") >= 1 and loop.count("kCustomCall") > 10
    check_mail(optimised(tmp_path), 8)
