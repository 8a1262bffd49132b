"""Which layout a released checkpoint has, and whether its tensors are those of one."""

import dataclasses
from typing import Any

from mimo_jax.checkpoint.layout import DRAFTER_FOLDER, MXFP4, SKIPPED, Declared, Layout, tile_count
from mimo_jax.config import FULL, ModelConfig
from mimo_jax.errors import MimoError


def detect(config: ModelConfig, tensors: dict[str, Any]) -> tuple[Layout, ModelConfig]:
    """The layout that a checkpoint has, by the dtypes and names of a few of its tensors.

    The configuration is amended by what only the files can tell: how many MTP layers there are, the
    router's dtype, whether the experts are MXFP4.

    Args:
      config: of the target, from config.json.
      tensors: stored tensors by name, the drafter's under "dflash/"; each has `dtype` and `shape`.

    Returns:
      the layout, and the configuration to use with it. That all else fits is `compare`'s to say.

    Raises:
      MimoError: for a dtype that no layout has.
    """

    def dtype(name: str, default: str) -> str:
        return tensors[name].dtype if name in tensors else default

    first = "model.layers.0.self_attn."
    fused = first + "qkv_proj.weight" in tensors
    moe = next((i for i, sparse in enumerate(config.moe_layer_freq) if sparse), None)
    experts = dtype(f"model.layers.{moe}.mlp.experts.0.gate_proj.weight", "BF16")
    router = dtype(f"model.layers.{moe}.mlp.gate.weight", "")
    places = {name.split(".")[3] for name in tensors if name.startswith("model.mtp.layers.")}
    mtp = 1 + max((int(place) for place in places if place.isdecimal()), default=-1)
    # None is a choice; some of those that the configuration promises is a damaged checkpoint.
    mtp = max(mtp, config.num_nextn_predict_layers) if mtp else 0
    other = dtype("model.embed_tokens.weight", "BF16")
    layout = Layout(
        fused=fused,
        linear=dtype(first + ("qkv_proj.weight" if fused else "q_proj.weight"), "BF16"),
        experts=experts,
        other=other,
        stacked=_is_stacked(config, tensors),
        mtp_fused="model.mtp.layers.0.self_attn.q_proj.weight" not in tensors if mtp else fused,
        drafter=dtype(DRAFTER_FOLDER + "fc.weight", other),
    )
    changes = {
        "num_nextn_predict_layers": mtp,
        "expert_format": "mxfp4" if experts == MXFP4 else "dense",
        "moe_router_dtype": {"BF16": "bfloat16", "F32": "float32"}.get(
            router, config.moe_router_dtype
        ),
    }
    return layout, dataclasses.replace(config, **changes)


def compare(found: dict[str, Any], declared: dict[str, Declared]) -> list[str]:
    """Holds stored tensors to what was declared.

    Args:
      found: stored tensors by name; each has `dtype` and `shape`.
      declared: from `declare`.

    Returns:
      names of the tensors of other modalities, which are left unread.

    Raises:
      MimoError: naming the tensors that are missing, that belong to nothing, or that have another
        dtype or shape.
    """
    skipped = [name for name in found if name.startswith(SKIPPED)]
    missing = [name for name in declared if name not in found]
    surplus = [name for name in found if name not in declared and not name.startswith(SKIPPED)]
    if missing or surplus:
        raise MimoError(
            "The checkpoint's tensors are not those of its configuration: "
            f"{_some('missing', missing)}; {_some('not known', surplus)}. Fetch the files again, "
            "index and config.json with them; a tensor that belongs to no layer may be deleted."
        )
    wrong = [
        f"{name} is {found[name].dtype}{list(found[name].shape)}, not {d.dtype}{list(d.shape)}"
        for name, d in declared.items()
        if (found[name].dtype, tuple(found[name].shape)) != (d.dtype, d.shape)
    ]
    if wrong:
        raise MimoError(
            f"Tensors are stored otherwise than this layout has them: {'; '.join(wrong[:4])} "
            f"({len(wrong)} in all). Fetch the files again; if they are a re-export, use the "
            "release that it was made from."
        )
    return skipped


def _some(what: str, names: list[str]) -> str:
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return f"{what}: {len(names)} ({shown})" if names else f"{what}: none"


def _is_stacked(config: ModelConfig, tensors: dict[str, Any]) -> bool:
    """Whether split K and V of full layers hide a common grid: by the rows of K's scales."""
    attention = config.attention_of(FULL)
    rows = attention.num_kv_heads * tile_count(attention.head_dim)
    plain = tile_count(attention.num_kv_heads * attention.head_dim)
    for layer in (i for i, kind in enumerate(config.hybrid_layer_pattern) if kind == FULL):
        scale = tensors.get(f"model.layers.{layer}.self_attn.k_proj.weight_scale_inv")
        if scale is not None and rows != plain:
            return tuple(scale.shape)[:1] != (plain,)
    return True
