"""How close is close: the one table of tolerances, and the comparison that uses it."""

import numpy as np

RELATIVE_NORM = {
    "float64": 1e-12,
    "float32": 1e-5,
    "bfloat16": 1e-2,
    "fp8 weights": 3e-2,
}
"""Largest ||out - ref|| / ||ref|| accepted, by the dtype that the result was computed in."""


def relative_norm(out, ref) -> float:
    """||out - ref|| / ||ref|| over all elements, in float64; infinite beside zero, unless equal."""
    out, ref = (np.asarray(x).astype(np.float64) for x in (out, ref))
    difference, scale = np.linalg.norm((out - ref).ravel()), np.linalg.norm(ref.ravel())
    if scale == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / scale)


def assert_close(out, ref, kind: str) -> None:
    """Fails unless `out` has `ref`'s shape, both are finite, and they agree to the table's figure.

    Args:
      out: the result under test.
      ref: what an independent computation gives.
      kind: a key of `RELATIVE_NORM`.
    """
    out, ref = np.asarray(out), np.asarray(ref)
    assert out.shape == ref.shape, f"shape {out.shape}, but the reference has {ref.shape}"
    assert ref.size, "comparing nothing: the reference has no elements"
    for name, value in (("result", out), ("reference", ref)):
        bad = ~np.isfinite(value.astype(np.float64))
        assert not bad.any(), f"{bad.sum()} of {bad.size} elements of the {name} are not finite"
    error, limit = relative_norm(out, ref), RELATIVE_NORM[kind]
    assert error <= limit, f"relative norm {error:.3e} exceeds {limit:.0e} ({kind})"
