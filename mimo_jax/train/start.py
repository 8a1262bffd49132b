"""What a run begins from: shapes, weights and tokenizer, out of a preset or a folder."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from flax import nnx

from mimo_jax.checkpoint import manifest, store
from mimo_jax.config import ModelConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.errors import MimoError
from mimo_jax.json_files import read_json
from mimo_jax.presets import drafter_preset, preset
from mimo_jax.text.tokenizer import Tokenizer, train_tokenizer
from mimo_jax.train.config import TrainConfig, load_config
from mimo_jax.train.sources import find_files, texts_of
from mimo_jax.train.steps import Steps

CHECKPOINT, RECIPE, TOKENIZER, DATA = store.FINISHED, "recipe.toml", "tokenizer.json", "data"
"""In a run's folder: the finished model, the whole configuration, the tokenizer, its tokens."""


def find_checkpoint(folder: str | Path) -> Path:
    """The checkpoint that a folder is, or that a finished run has in it.

    Raises:
      MimoError: if there is none.
    """
    folder = Path(folder)
    for path in (folder, folder / CHECKPOINT):
        if (path / manifest.NAME).exists():
            return path
    if not folder.is_dir():
        raise MimoError(f"{folder} is not a directory: give a checkpoint's or a run's folder.")
    unfinished = f"; its training is at step {Steps(folder).newest}" * bool(Steps(folder).newest)
    raise MimoError(
        f"{folder} holds no checkpoint of ours and no finished run{unfinished}. `mimo convert` "
        "makes one of a released checkpoint."
    )


@dataclasses.dataclass(frozen=True)
class Start:
    """Shapes and tokenizer of a run's target, and where its weights come from.

    Attributes:
      config: of the target.
      tokenizer: the file, in the run's folder.
      checkpoint: whose weights are loaded, or None for random ones.
      run: a run with float32 masters to go on from, or None.
    """

    config: ModelConfig
    tokenizer: Path
    checkpoint: store.Checkpoint | None = None
    run: Path | None = None


def resolve(config: TrainConfig, *, masters: bool) -> Start:
    """Finds out what a run begins from, and puts its tokenizer into its folder.

    Args:
      config: of the run; `model.start` wins over a preset.
      masters: whether float32 masters of a run in `model.start` are wanted, if it has them, rather
        than its finished checkpoint.

    Raises:
      MimoError: if model.start and model.preset are both given, or neither and the shape lacks
        fields; or if what is named does not fit.
    """
    out, section = Path(config.run.out), config.model
    if config.run.fork:
        folder = Path(config.run.fork)
        read_recipe(folder)
        tokenizer = _tokenizer(config, out, folder / TOKENIZER)
        return Start(ModelConfig.from_dict(read_json(folder / store.CONFIG)), tokenizer)
    if section.start and (section.preset or section.shape):
        raise MimoError("model.start is given: its shapes count; leave model.preset and shape out.")
    checkpoint = run = None
    if section.start:
        folder = Path(section.start)
        if masters and (folder / RECIPE).exists() and Steps(folder).newest is not None:
            run, shapes = folder, ModelConfig.from_dict(read_json(folder / store.CONFIG))
            source = folder / TOKENIZER
        else:
            checkpoint = store.open_checkpoint(find_checkpoint(folder))
            shapes, source = checkpoint.config, checkpoint.tokenizer
        tokenizer = _tokenizer(config, out, source)
    else:
        tokenizer = _tokenizer(config, out, None)
        shapes = _fresh(config, Tokenizer.from_file(tokenizer))
    _check(config, shapes, Tokenizer.from_file(tokenizer))
    return Start(shapes, tokenizer, checkpoint, run)


def _tokenizer(config: TrainConfig, out: Path, source: Path | None) -> Path:
    """The run's tokenizer.json: there already, named, the start's, or trained on the data."""
    path = out / TOKENIZER
    if path.exists():
        return path
    out.mkdir(parents=True, exist_ok=True)
    if config.data.tokenizer and not config.run.fork:
        source = Path(config.data.tokenizer)
    if source is not None:
        Tokenizer.from_file(source)
        shutil.copyfile(source, path)
        return path
    files = find_files(config.data.files)
    if not files:
        raise MimoError("data.files is empty: name the text to train on.")
    backend = train_tokenizer(texts_of(files), config.data.vocabulary)
    manifest.write_atomically(path, backend.to_str().encode())
    return path


def _fresh(config: TrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Shapes of a model with random weights, its vocabulary the tokenizer's."""
    section = config.model
    base: dict[str, Any] = preset(section.preset).to_dict() if section.preset else {}
    base |= {"vocab_size": tokenizer.vocab_size, "eos_token_ids": list(tokenizer.eos_ids)}
    try:
        return ModelConfig.from_dict(base | section.shape)
    except MimoError as error:
        if section.preset:
            raise
        raise MimoError(
            f"model has no start and no preset, and its shape is not whole: {error} Name one, or "
            "begin with a recipe, such as checkpoints/toy.toml."
        ) from None


def _check(config: TrainConfig, shapes: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > shapes.vocab_size:
        raise MimoError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the model {shapes.vocab_size}: use "
            "the one that the model was trained with, or a larger model.shape.vocab_size."
        )
    longest = shapes.max_position_embeddings
    if config.data.length > longest:
        raise MimoError(
            f"data.length={config.data.length} is not allowed: the model's context is {longest}."
        )


def load_target(start: Start, abstract: nnx.State, placed: Any) -> nnx.State:
    """A checkpoint's target, experts decoded, in the dtypes and places that are asked for.

    Args:
      start: with a checkpoint.
      abstract: of `abstract_target`, or in another dtype.
      placed: NamedShardings like it.
    """
    params, _ = store.load(start.checkpoint, (abstract, None), (placed, None))
    return params


def read_recipe(run: str | Path) -> TrainConfig:
    """The configuration that a run was begun with.

    Raises:
      MimoError: if the folder is no run's.
    """
    path = Path(run) / RECIPE
    if not path.exists():
        raise MimoError(f"{run} is not the folder of a run: it has no {RECIPE}.")
    return load_config(path)


def drafter_shapes(config: TrainConfig, target: ModelConfig, tokenizer: Tokenizer) -> DrafterConfig:
    """The drafter's shapes: a preset's, or by the target's, with the fields of drafter.shape.

    Raises:
      MimoError: if they are not whole or do not fit the target.
    """
    section = config.drafter
    base: dict[str, Any] = (
        drafter_preset(section.preset).to_dict() if section.preset else _by_target(target)
    )
    base |= {"vocab_size": target.vocab_size} | section.shape
    if "mask_token_id" not in section.shape:
        base["mask_token_id"] = tokenizer.mask_id
    shapes = DrafterConfig.from_dict(base)
    shapes.check_target(target)
    return shapes


def _by_target(target: ModelConfig) -> dict[str, Any]:
    """A small drafter in the target's proportions: two sliding layers, a block of 8."""
    heads = target.num_attention_heads
    size = max(16, target.hidden_size // heads // 8 * 8)
    return {
        "hidden_size": target.hidden_size,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": target.swa_num_key_value_heads,
        "head_dim": size,
        "intermediate_size": 2 * target.hidden_size,
        "block_size": 8,
        "target_layer_ids": taps(target.num_hidden_layers),
        "rope_theta": 1e4,
        "sliding_window": min(256, target.max_position_embeddings),
        "partial_rotary_factor": 0.5,
        "attention_value_scale": 0.612,
        "add_swa_attention_sink_bias": True,
        "causal_layers": (),
    }


def taps(layers: int, count: int = 5) -> tuple[int, ...]:
    """Layers whose outputs a drafter reads, spread from the second to the third from last.

    All of them in a target of no more than `count` layers; else as DFlash (arXiv 2602.06036) does.
    """
    if layers <= count:
        return tuple(range(layers))
    first, last = 1, max(layers - 3, count)
    return tuple(round(first + i * (last - first) / (count - 1)) for i in range(count))
