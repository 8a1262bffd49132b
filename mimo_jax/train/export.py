"""Finished models out of training states: packed experts, and checkpoints that `load` opens."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.checkpoint import store
from mimo_jax.checkpoint.flat import flatten, nest
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.quant.mxfp4 import quantize
from mimo_jax.train.pretrain import compute_params


def target_arrays(params: nnx.State, rule: str | None, dtype: Any) -> dict[str, np.ndarray]:
    """The checkpoint's arrays by name: what a step would compute with, bit for bit.

    Args:
      params: float32 masters.
      rule: experts become MXFP4 codes and scales, whose shared exponents this chooses; None keeps
        them dense.
      dtype: of all but these and the router.
    """
    arrays = flatten(jax.jit(compute_params, static_argnums=(1, 2))(params, None, dtype))
    if rule is None:
        return arrays
    masters = {n: v for n, v in flatten(params).items() if n.endswith(_EXPERTS)}
    for name, value in masters.items():
        codes, scales = quantize(jnp.asarray(value), rule)
        arrays[name], arrays[f"{name}_scale"] = np.asarray(codes), np.asarray(scales)
    return arrays


_EXPERTS = ("experts.gate_up", "experts.down")


def save_target(
    folder: Path, config: ModelConfig, arrays: dict[str, np.ndarray], tokenizer: Path, notes: dict
) -> Path:
    """Writes a target's checkpoint, in place of one that is there."""
    store.save(folder, config, nest(arrays), tokenizer=tokenizer, notes=notes, overwrite=True)
    return folder


def save_with_drafter(
    folder: Path,
    target: store.Checkpoint,
    config: DrafterConfig,
    params: nnx.State,
    dtype: Any,
    tokenizer: Path,
    notes: dict,
) -> Path:
    """Writes a checkpoint of a target, as it is stored, its MTP layers included, and a drafter.

    Args:
      folder: to write.
      target: whose arrays are copied, and what it says on conversations.
      config: of the drafter.
      params: its float32 masters.
      dtype: to store it in.
      tokenizer: of both.
      notes: for the manifest.
    """
    drafter = flatten(jax.tree.map(lambda x: x.astype(dtype), params))
    store.save(
        folder,
        target.config,
        nest(stored_target(target)),
        config,
        nest(drafter),
        mtp_config=target.mtp,
        mtp_params=nest(stored_part(target, target.mtp.part)) if target.mtp else None,
        tokenizer=tokenizer,
        carried=target.directory,
        notes=notes,
        overwrite=True,
    )
    return folder


def stored_target(checkpoint: store.Checkpoint) -> dict[str, np.ndarray]:
    """A checkpoint's target as it is stored: the same dtypes, codes and scales; on the host."""
    return stored_part(checkpoint, "target")


def stored_part(checkpoint: store.Checkpoint, part: str) -> dict[str, np.ndarray]:
    """The same of its target, drafter or MTP layers."""
    names = [name for name in checkpoint.manifest.arrays if name.startswith(f"{part}.")]
    return {n.removeprefix(f"{part}."): v for n, v in store.read(checkpoint, names).items()}
