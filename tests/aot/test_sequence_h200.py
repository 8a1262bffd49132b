"""Training's attention compiles for an H200, without scores in memory."""

import h200
import pytest
from h200 import report
from sequence_cases import ROWS

from mimo_jax.bench.train import CASES

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(bool(h200.missing()), reason=h200.missing() or ""),
]


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize(("size", "name"), [("nano", "nano"), ("billion", "1b")])
def test_attention_of_training(size, name, kind):
    found = report(f"sequence_cases:{size}_{kind}")
    config, t = CASES[name].config, CASES[name].length
    scores = 4 * ROWS * config.num_attention_heads * t * t
    assert found.launches == 0 and found.temporaries < scores / 4
