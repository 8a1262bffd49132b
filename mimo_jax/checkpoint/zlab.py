"""DFlash drafters that come by themselves, as z-lab and others store them.

They hold the tensors of Xiaomi's "dflash" folder under the same or other names: with a prefix, with
query, key and value fused, with the names of an encoder. z-lab's have no embedding of the mask: it
is the target's own row. What a drafter has and ours does not is refused by name.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from mimo_jax.checkpoint import released
from mimo_jax.checkpoint.assemble import Assembler
from mimo_jax.checkpoint.layout import DRAFTER_FOLDER, MASK_EMBEDDING, Declared, Recipe, Run
from mimo_jax.checkpoint.recognition import compare
from mimo_jax.checkpoint.safetensors import TensorFiles
from mimo_jax.checkpoint.torch_file import read_mask_embedding
from mimo_jax.checkpoint.xiaomi import declare_drafter, drafter_recipes
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.errors import MimoError
from mimo_jax.json_files import read_json

CONFIG, MASK = "config.json", Path(MASK_EMBEDDING).name
PART = "drafter"
RENAMED = (
    (r"^model\.", ""),
    (r"^encoder\.fc\.", "fc."),
    (r"^encoder\.output_norm_enc\.", "hidden_norm."),
    (r"^midlayer\.", "layers.0."),
)
"""Beginnings of names in other exports, and what they stand for."""

OTHERS = {
    r"(^|\.)(t2d|d2t)$": "a vocabulary of its own",
    r"^(lm_head|embed_tokens)\.": "an embedding or a head of its own",
    r"_conv\.": "DFlash2's convolutions",
    r"^candidate_selector\.": "DFlash2's candidate selector",
    r"markov|confidence": "DSpark's heads",
    r"\.g_proj\.": "gated attention",
    r"aux_hidden_norms": "a norm for each tapped layer",
    r"\.(q|k|v|o|qkv|gate|up|down)_proj\.bias$": "biases",
}
"""Tensors of drafters that are not supported."""


@dataclasses.dataclass(frozen=True)
class StoredDrafter:
    """An opened drafter: names, shapes and dtypes are checked, no weight is read yet.

    Attributes:
      directory: of the files.
      config: the shapes.
      mask: the mask's embedding, or None where it is a row of the target's own.
    """

    directory: Path
    config: DrafterConfig
    mask: np.ndarray | None
    files: TensorFiles
    names: dict[str, str]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return self.files.nbytes

    def with_mask(self, mask: np.ndarray) -> "StoredDrafter":
        """The same with that embedding of the mask."""
        return dataclasses.replace(self, mask=mask)

    def read(self, name: str) -> np.ndarray:
        """A stored tensor, by the name that its recipe has."""
        if name == MASK and self.mask is not None:
            return self.mask
        return self.files.read(self.names[name])

    def release(self, names: list[str]) -> None:
        """Lets the memory of tensors' pages go."""
        self.files.release([self.names[name] for name in names if name in self.names])

    def assembler(self, shards: int = 1) -> Assembler:
        """What makes its parameters for that many devices."""
        return Assembler(_recipes(self.config, self.dtype, self.names, shards), self.read)

    def check_rows(self, parameter: str) -> None:
        """Nothing to check: only FP8 has rows that could lie otherwise."""


def open_drafter(directory: str | Path, target: ModelConfig) -> StoredDrafter:
    """Reads a drafter's configuration and headers, and holds them to each other and the target.

    Args:
      directory: with config.json and safetensors files; with mask_embedding.pt, if there is one.
      target: that it is to draft for.

    Raises:
      MimoError: if a file is missing or damaged, the drafter has a part that is not supported, or
        it was not made for such a target.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise MimoError(
            f"{directory} has no {CONFIG}: give a drafter's directory, with its {CONFIG} and its "
            "safetensors file."
        )
    config = DrafterConfig.from_dict(read_json(directory / CONFIG))
    config.check_target(target)
    if config.mask_token_id >= target.vocab_size:
        raise MimoError(
            f"{directory / CONFIG} has mask_token_id={config.mask_token_id}, which is not in the "
            f"target's vocabulary of {target.vocab_size}: it drafts for another model."
        )
    files = TensorFiles.open(directory)
    names = _names(directory, files)
    dtype = files.tensors[names["fc.weight"]].dtype if "fc.weight" in names else "BF16"
    declared = _declared(config, dtype, names)
    declared.pop(MASK)
    compare({name: files.tensors[stored] for name, stored in names.items()}, declared)
    return StoredDrafter(directory, config, _mask(directory, config), files, names, dtype)


def load(
    drafter: StoredDrafter, params: nnx.State, shardings: Any, embedding: jax.Array
) -> nnx.State:
    """Reads a drafter's parameters onto a mesh.

    Args:
      drafter: from `open_drafter`.
      params: the abstract state, as a `decode.program.Plan` has it.
      shardings: NamedShardings in the same tree.
      embedding: the target's, loaded; its row is the mask's embedding where the drafter has none.

    Returns:
      the state, with arrays.

    Raises:
      MimoError: naming a tensor that is damaged.
    """
    if drafter.mask is None:
        drafter = drafter.with_mask(np.asarray(embedding[drafter.config.mask_token_id]))
    states = released.load(drafter, (None, params), (None, shardings), parts=("target", PART))
    return states[1]


def _names(directory: Path, files: TensorFiles) -> dict[str, str]:
    """Stored names by the names that they stand for."""
    names: dict[str, str] = {}
    for stored in files.tensors:
        name = stored
        for pattern, plain in RENAMED:
            name = re.sub(pattern, plain, name)
        for pattern, what in OTHERS.items():
            if re.search(pattern, name):
                raise MimoError(
                    f"{directory}: the drafter has {what} ({stored}), which is not supported: take "
                    "a DFlash drafter without."
                )
        if name in names:
            raise MimoError(f"{directory}: {stored} and {names[name]} are both {name}: keep one.")
        names[name] = stored
    return names


def _fused(names: dict[str, str]) -> dict[str, tuple[str, str]]:
    """By split name, such as "layers.0.self_attn.k_proj.weight", the fused one and the letter."""
    return {
        name.replace("qkv_proj", f"{letter}_proj"): (name, letter)
        for name in names
        if name.endswith(".self_attn.qkv_proj.weight")
        for letter in "qkv"
    }


def _declared(config: DrafterConfig, dtype: str, names: dict[str, str]) -> dict[str, Declared]:
    """The tensors that the drafter must store, by plain names."""
    fused = _fused(names)
    declared: dict[str, Declared] = {}
    for listed, tensor in declare_drafter(config, dtype).items():
        name = listed.removeprefix(DRAFTER_FOLDER)
        if name in fused:
            name = fused[name][0]
            rows = tensor.shape[0] + (declared[name].shape[0] if name in declared else 0)
            tensor = tensor._replace(shape=(rows, tensor.shape[1]))
        declared[name] = tensor
    return declared


def _recipes(
    config: DrafterConfig, dtype: str, names: dict[str, str], shards: int
) -> dict[str, Recipe]:
    """What makes each parameter, by plain names; a fused tensor holds Q, then K, then V."""
    fused = _fused(names)
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    begins = {"q": 0, "k": heads * config.head_dim, "v": (heads + kv) * config.head_dim}

    def renamed(run: Run) -> Run:
        name = run.tensor.removeprefix(DRAFTER_FOLDER)
        if name not in fused:
            return run._replace(tensor=name)
        name, letter = fused[name]
        begin = begins[letter]
        return run._replace(tensor=name, start=run.start + begin, stop=run.stop + begin)

    return {
        parameter: dataclasses.replace(
            recipe, runs=tuple(tuple(map(renamed, runs)) for runs in recipe.runs)
        )
        for parameter, recipe in drafter_recipes(config, dtype, shards).items()
    }


def _mask(directory: Path, config: DrafterConfig) -> np.ndarray | None:
    """The mask's embedding, if the drafter brings one."""
    path = directory / MASK
    if not path.exists():
        return None
    token, mask = read_mask_embedding(path)
    if token != config.mask_token_id or mask.shape != (config.hidden_size,):
        raise MimoError(
            f"{path} holds {mask.shape[0]} numbers for token {token}; the drafter's {CONFIG} has "
            f"hidden_size={config.hidden_size} and mask_token_id={config.mask_token_id}: they are "
            "of different drafters. Fetch both again."
        )
    return mask if mask.dtype != np.float16 else mask.astype(np.float32)
