"""Writes tests/golden/transformers/*.npz: rows of transformers' logits for small random models.

Run it with torch 2.13.0 and transformers 5.23.0 installed (`pip install -e '.[dev,oracle]'`):

    python tests/golden/make_transformers_golden.py

Each file has the configuration (JSON), the tokens, the seed that `random_checkpoint` makes the
weights from again, sums over those weights, and what transformers gave at a few positions.
"""

import json
import pathlib
import sys

import numpy as np

FOLDER = pathlib.Path(__file__).resolve().parent / "transformers"
sys.path.insert(0, str(FOLDER.parent.parent))

from oracles import transformers_run  # noqa: E402  (found by the line above)
from oracles.random_weights import example  # noqa: E402

SEEDS = range(12)


def fingerprint(weights):
    """Two float64 sums over each weight: they notice another generator, but not another libm."""
    sums = []
    for value in weights.values():
        flat = value.astype(np.float64).ravel()
        sums.append([np.abs(flat).sum(), flat @ np.cos(np.arange(flat.size))])
    return np.array(sums)


def load(path):
    """A golden's configuration, weights, tokens, rows, logits [rows, w], residuals [l, rows, d].

    Raises:
      AssertionError: if the weights made from the seed are not those that transformers was given.
    """
    with np.load(path) as stored:
        config, weights, tokens = example(int(stored["seed"]))
        assert config == json.loads(str(stored["config"])), f"{path}: another configuration"
        np.testing.assert_allclose(
            fingerprint(weights), stored["fingerprint"], rtol=1e-5, atol=1e-5, err_msg=str(path)
        )
        np.testing.assert_array_equal(tokens, stored["tokens"])
        return config, weights, tokens, stored["rows"], stored["logits"], stored["residuals"]


def main():
    """Writes one file a seed."""
    FOLDER.mkdir(exist_ok=True)
    for seed in SEEDS:
        config, weights, tokens = example(seed)
        logits, residuals = transformers_run.run(weights, config, tokens)
        window = config["sliding_window"]
        rows = np.array([0, window - 1, window, window + 1, 3 * window, len(tokens) - 1])
        np.savez_compressed(
            FOLDER / f"seed{seed:02d}.npz",
            seed=seed,
            config=json.dumps(config),
            fingerprint=fingerprint(weights).astype(np.float32),
            tokens=tokens,
            rows=rows,
            logits=logits[rows],
            residuals=residuals[:, rows],
        )
        print(f"seed {seed}: {len(tokens)} tokens, logits of norm {np.linalg.norm(logits):.1f}")


if __name__ == "__main__":
    main()
