"""The drafter's mask_embedding.pt, read without unpickling: one tensor and one integer."""

from pathlib import Path

import numpy as np

from mimo_jax.errors import MimoError


def read_mask_embedding(path: str | Path) -> tuple[int, np.ndarray]:
    """Reads {mask_token_id: int, embedding: tensor [d]} as torch.save writes it.

    Returns:
      the token's id, and its embedding: bfloat16, float16 or float32, [d].

    Raises:
      MimoError: if the file holds anything else.
    """
    raise MimoError(f"{path}: not yet.")
