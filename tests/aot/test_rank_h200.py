"""A rank of the large model on an H200, on a machine that has none: one graph, few kernels."""

import h200
import pytest
from h200 import report
from rank_cases import LAYERS

pytestmark = [
    pytest.mark.aot,
    pytest.mark.slow,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]
MOST_KERNELS = 33
"""A layer with XLA's own products: what it was when the first rank was measured."""


@pytest.mark.parametrize("case", ["drafted", "drafted_long", "plain"])
def test_the_rounds_of_a_rank_are_one_graph(case):
    found = report(f"rank_cases:{case}")
    assert not found.outside and len(found.graphs) == 1
    # Two launches of the kernel a sparse layer; a drafter and the head beside the layers.
    assert found.launches == 2 * (LAYERS - 1) and found.lowered == 2
    assert len(found.graphs[0]) < MOST_KERNELS * LAYERS + 250
    # Scores over a million tokens: [16 heads, 8 rows] in float32, a few times over.
    assert found.temporaries < (3e9 if case == "drafted_long" else 3e8)
