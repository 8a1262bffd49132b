"""A rank of the large model on an H200, on a machine that has none: one graph, few kernels."""

import collections

import h200
import pytest
from h200 import report
from rank_cases import LAYERS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]
MOSTS = {"drafted": 180, "drafted_long": 180, "plain": 140}
"""Kernels of a graph of nine layers: 5 a sparse layer, the drafter's, the head, the loop's own.

XLA's own products were 33 a layer.
"""
KERNELS = {
    "attention_chunks": 1,
    "attention_combine": 1,
    "attention_ring_block": 1,
    "attention_turn": 1,
    "expert_ffn": 2,  # The last layer has no weights to bring near.
    "router": 1,
}
"""Compiled once each, whatever the number of layers."""


@pytest.mark.parametrize("case", sorted(MOSTS))
def test_the_rounds_of_a_rank_are_one_graph_of_few_kernels(case):
    found = report(f"rank_cases:{case}")
    assert not found.outside and len(found.graphs) == 1
    names = collections.Counter(kernel.name for kernel in found.kernels)
    assert {name: names[name] for name in KERNELS} == KERNELS
    assert found.lowered == len(found.kernels)
    # Five launches a sparse layer, and two more where attention is full.
    assert found.launches > 5 * (LAYERS - 1)
    assert len(found.graphs[0]) < MOSTS[case]
    # What spills are counters, not what is multiplied.
    assert all(kernel.spilled_bytes < 100 for kernel in found.kernels)
    # No scores in memory, of a million tokens either.
    assert found.temporaries < (1e8 if case == "drafted_long" else 1e7)


def test_whole_layers_save_two_launches_of_a_window():
    whole, separate = report("rank_cases:drafted_whole"), report("rank_cases:drafted")
    names = [kernel.name for kernel in whole.kernels]
    assert names.count("attention_layer") == 1 and "attention_ring_block" not in names
    assert not whole.outside and len(whole.graphs) == 1
    # All but the first layer, which has no experts, and one whose attention is full.
    assert separate.launches - whole.launches == 2 * (LAYERS - 2)


def test_two_ranks_exchange_inside_the_graph_with_no_launch_more_a_layer():
    """What is summed comes in the type that it is exchanged in, and the stream is added there."""
    alone, two = (report("rank_cases:drafted_whole", devices=n) for n in (1, 2))
    assert not two.outside and len(two.graphs) == 1
    names = {kernel.name for kernel in two.kernels} - {kernel.name for kernel in alone.kernels}
    assert names == {"all_gather", "all_sum", "open_mail"}
    # Two sums a layer, and those of the embeddings, the head and the drafter.
    assert two.launches - alone.launches > 2 * LAYERS
    xlas = [found.graphs[0].count("kCustomKernel") for found in (alone, two)]
    assert xlas[1] - xlas[0] < LAYERS - 1
