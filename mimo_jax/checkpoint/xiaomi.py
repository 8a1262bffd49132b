"""How Xiaomi's released checkpoints store a model: one table of tensors and of what they make.

Each release stores the same model in another way: attention split or fused, weights in FP8 with
scales or plain, experts in FP8 or MXFP4. A `Layout` says which; `declare` lists every tensor that
such a checkpoint must hold; `recipes` says which rows of which tensors make each of our parameters.
Both come out of one walk over the model, so that they cannot disagree, and nothing here needs JAX
or a file: `plan` and `inspect` read the same table as loading, converting and exporting.

What is peculiar to Xiaomi's files:

* `qkv_proj` holds `num_key_value_heads` chunks [Q_c | K_c | V_c], on full and sliding layers alike;
  a sliding layer with more key/value heads has several of them in a chunk.
* Its scales are a grid of 128 x 128 tiles that begins anew at each chunk and runs straight through
  Q, K and V inside it, so that a tile may hold the end of K and the beginning of V.
* Split `k_proj` and `v_proj` of full layers (MiMo-V2-Flash) hide the same grid: the tiles run
  through each key head and its value head, and the scales of a tile lie with the tensor in which
  it begins.
"""

import dataclasses

from mimo_jax.checkpoint.heads import Fused, Projection, Split, join, repeats, rows_of
from mimo_jax.checkpoint.layout import (
    BLOCK,
    DRAFTER_FOLDER,
    FP8,
    LAYOUTS,
    MASK_EMBEDDING,
    MXFP4,
    TILE,
    Declared,
    Layout,
    Recipe,
    Run,
    tile_count,
)
from mimo_jax.config import FULL, SLIDING, ModelConfig
from mimo_jax.drafter_config import DrafterConfig
from mimo_jax.errors import MimoError


def declare(
    config: ModelConfig, drafter: DrafterConfig | None, layout: Layout | str
) -> dict[str, Declared]:
    """Every tensor that a checkpoint of a layout stores, those of `SKIPPED` left out.

    The MTP layers are as many as `config.num_nextn_predict_layers`; the drafter's tensors are
    listed under "dflash/".

    Args:
      config: of the target.
      drafter: of the drafter, or None.
      layout: or a name in `LAYOUTS`.

    Raises:
      MimoError: if the layout is not known, or cannot hold a model of these sizes.

    Example:
      >>> from mimo_jax.presets import preset
      >>> tensors = declare(preset("mimo-v2.6-flash"), None, "v2.6")
      >>> tensors["model.layers.0.self_attn.qkv_proj.weight"].shape
      (13568, 4096)
    """
    return _walk(config, drafter, layout, 1).tensors


def recipes(
    config: ModelConfig, drafter: DrafterConfig | None, layout: Layout | str, shards: int = 1
) -> dict[str, Recipe]:
    """What makes each parameter: "target.layers.0.attention.qkv" and so on, "drafter." and "mtp.".

    Forwards a reader takes, for each leading index, the rows of its runs one after the other.
    Backwards (with shards=1, where every stored row of a weight occurs exactly once) a writer puts
    them back; `backwards` turns the table around. Parameters are in the stored form: FP8 and MXFP4
    codes with their scales beside them.

    Args:
      config: of the target.
      drafter: of the drafter, or None.
      layout: or a name in `LAYOUTS`.
      shards: devices of the mesh: with more than key/value heads, heads are repeated.

    Raises:
      MimoError: as `declare`.
    """
    return _walk(config, drafter, layout, shards).parameters


def declare_drafter(drafter: DrafterConfig, dtype: str) -> dict[str, Declared]:
    """`declare` for a DFlash drafter by itself, stored in one plain dtype."""
    return _drafter_table(drafter, dtype, 1).tensors


def drafter_recipes(drafter: DrafterConfig, dtype: str, shards: int = 1) -> dict[str, Recipe]:
    """`recipes` for a DFlash drafter by itself, stored in one plain dtype."""
    return _drafter_table(drafter, dtype, shards).parameters


def _walk(config, drafter, layout, shards) -> "_Table":
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise MimoError(f"layout={layout!r} is not known; there are {', '.join(LAYOUTS)}.")
        layout = LAYOUTS[layout]
    table = _Table(layout, shards)
    table.target(config)
    table.mtp(config)
    if drafter is not None:
        table.drafter(drafter)
    return table


def _drafter_table(drafter: DrafterConfig, dtype: str, shards: int) -> "_Table":
    table = _Table(dataclasses.replace(LAYOUTS["fused-bf16"], drafter=dtype), shards)
    table.drafter(drafter)
    return table


class _Table:
    """The walk over a model: notes each stored tensor, and the recipe of each parameter."""

    def __init__(self, layout: Layout, shards: int):
        self.layout, self.shards = layout, shards
        self.tensors: dict[str, Declared] = {}
        self.parameters: dict[str, Recipe] = {}

    def target(self, config: ModelConfig) -> None:
        other = self.layout.other
        w, d = config.vocab_size, config.hidden_size
        self.matrices("target.embedding", ["model.embed_tokens"], (), w, d, other)
        for layer, kind in enumerate(config.hybrid_layer_pattern):
            ours, theirs = f"target.layers.{layer}.", f"model.layers.{layer}."
            self.vector(f"{ours}input_norm.weight", f"{theirs}input_layernorm.weight", d)
            names = (f"{ours}attention.", f"{theirs}self_attn.")
            self.attention(*names, config, kind, self.layout.fused)
            self.vector(f"{ours}post_norm.weight", f"{theirs}post_attention_layernorm.weight", d)
            if config.moe_layer_freq[layer]:
                self.moe(f"{ours}ffn.", f"{theirs}mlp.", config)
            else:
                self.mlp(f"{ours}ffn.", [f"{theirs}mlp."], (), d, config.intermediate_size)
        self.vector("target.norm.weight", "model.norm.weight", d)
        self.matrices("target.head", ["lm_head"], (), w, d, other)

    def mtp(self, config: ModelConfig) -> None:
        d = config.hidden_size
        for layer in range(config.num_nextn_predict_layers):
            ours, theirs = f"mtp.layers.{layer}.", f"model.mtp.layers.{layer}."
            norms = {
                "token_norm": "enorm",
                "hidden_norm": "hnorm",
                "input_norm": "input_layernorm",
                "post_norm": "pre_mlp_layernorm",
                "norm": "final_layernorm",
            }
            for name, stored in norms.items():
                self.vector(f"{ours}{name}.weight", f"{theirs}{stored}.weight", d)
            projection = [f"{theirs}eh_proj"]
            self.matrices(f"{ours}projection", projection, (), d, 2 * d, self.layout.other)
            names = (f"{ours}attention.", f"{theirs}self_attn.")
            self.attention(*names, config, SLIDING, self.layout.mtp_fused)
            self.mlp(f"{ours}ffn.", [f"{theirs}mlp."], (), d, config.intermediate_size)

    def drafter(self, config: DrafterConfig) -> None:
        dtype = self.layout.drafter
        d, n, h = config.hidden_size, config.num_attention_heads, config.head_dim
        taps = len(config.target_layer_ids)
        folder = DRAFTER_FOLDER
        self.matrices("drafter.features", [f"{folder}fc"], (), d, taps * d, dtype)
        self.vector("drafter.context_norm.weight", f"{folder}hidden_norm.weight", d, dtype)
        self.vector("drafter.norm.weight", f"{folder}norm.weight", d, dtype)
        self.vector("drafter.mask_embedding", MASK_EMBEDDING, d, dtype)
        for layer in range(config.num_hidden_layers):
            ours, theirs = f"drafter.layers.{layer}.", f"{folder}layers.{layer}."
            self.vector(f"{ours}input_norm.weight", f"{theirs}input_layernorm.weight", d, dtype)
            self.vector(
                f"{ours}post_norm.weight", f"{theirs}post_attention_layernorm.weight", d, dtype
            )
            ours, theirs = f"{ours}attention.", f"{theirs}self_attn."
            attention = config.attention_of(layer)
            self.matrices(f"{ours}query", [f"{theirs}q_proj"], (), n * h, d, dtype)
            kv = Split(theirs, attention, stacked=False, queries=False)
            self.heads(f"{ours}kv", kv, d, dtype)
            self.matrices(f"{ours}output", [f"{theirs}o_proj"], (), d, n * h, dtype)
            self.vector(f"{ours}query_norm.weight", f"{theirs}q_norm.weight", h, dtype)
            self.vector(f"{ours}key_norm.weight", f"{theirs}k_norm.weight", h, dtype)
            if attention.sink:
                self.vector(f"{ours}sink", f"{theirs}attention_sink_bias", n, dtype)
            ours, theirs = ours.replace("attention.", "mlp."), theirs.replace("self_attn.", "mlp.")
            self.mlp(ours, [theirs], (), d, config.intermediate_size, dtype)

    def attention(self, ours, theirs, config: ModelConfig, kind: int, fused: bool) -> None:
        """Attention of a target or MTP layer."""
        attention = config.attention_of(kind)
        d, n = config.hidden_size, attention.num_heads
        if fused:
            stored = Fused(theirs, attention, config.num_key_value_heads)
        else:
            stored = Split(theirs, attention, kind == FULL and self.layout.stacked)
        self.heads(f"{ours}qkv", stored, d, self.layout.linear)
        columns = n * attention.v_head_dim
        self.matrices(f"{ours}output", [f"{theirs}o_proj"], (), d, columns, self.layout.other)
        if attention.sink:
            self.vector(f"{ours}sink", f"{theirs}attention_sink_bias", n)

    def heads(self, ours: str, stored: "Projection", d: int, dtype: str) -> None:
        """A projection to heads, grouped by key/value head as our modules have it."""
        count = max(self.shards, stored.config.num_kv_heads)
        groups = [stored.group(index, count) for index in range(count)]
        for name, rows in stored.tensors.items():
            self.tensors[f"{name}.weight"] = Declared(dtype, (rows, d), ours)
        runs = tuple(join(stored.run(letter, head) for letter, head in group) for group in groups)
        self.parameters[ours] = Recipe(dtype, (count, rows_of(runs[0]), d), runs, 1)
        if dtype != FP8:
            return
        ours, columns, unit = f"{ours}_scale", tile_count(d), stored.config.scale_unit
        for name, rows in stored.scales.items():
            self.tensors[f"{name}.weight_scale_inv"] = Declared("F32", (rows, columns), ours)
        runs = tuple(join(repeats(stored.scale_places(group, unit))) for group in groups)
        shape = (count, rows_of(runs[0]), columns)
        self.parameters[ours] = Recipe("F32", shape, runs, 1, (unit, TILE))

    def moe(self, ours: str, theirs: str, config: ModelConfig) -> None:
        e, d = config.n_routed_experts, config.hidden_size
        router = {"bfloat16": "BF16", "float32": "F32"}[config.moe_router_dtype]
        self.matrices(f"{ours}router.weight", [f"{theirs}gate"], (), e, d, router)
        self.vector(f"{ours}router.bias", f"{theirs}gate.e_score_correction_bias", e, "F32")
        names = [f"{theirs}experts.{expert}." for expert in range(e)]
        width = config.moe_intermediate_size
        self.mlp(f"{ours}experts.", names, (e,), d, width, self.layout.experts)

    def mlp(self, ours, theirs: list[str], lead, d: int, f: int, dtype: str | None = None) -> None:
        """Gate, up and down projections of a dense MLP, or of all experts of a layer."""
        dtype = dtype or self.layout.linear
        pairs = [f"{name}{part}_proj" for name in theirs for part in ("gate", "up")]
        self.matrices(f"{ours}gate_up", pairs, (*lead, 2), f, d, dtype)
        self.matrices(f"{ours}down", [f"{name}down_proj" for name in theirs], lead, d, f, dtype)

    def matrices(
        self, ours: str, theirs: list[str], lead: tuple[int, ...], rows: int, columns: int, dtype
    ) -> None:
        """A parameter of whole matrices, one for each leading index, with the scales they have."""
        if dtype == MXFP4 and columns % BLOCK:
            raise MimoError(
                f"{theirs[0]} has {columns} columns, which blocks of {BLOCK} do not divide: it "
                "cannot be stored as MXFP4."
            )
        width = columns // 2 if dtype == MXFP4 else columns
        self._stack(ours, [f"{name}.weight" for name in theirs], lead, (rows, width), dtype)
        if dtype == FP8:
            names = [f"{name}.weight_scale_inv" for name in theirs]
            shape, tile = (tile_count(rows), tile_count(columns)), (TILE, TILE)
            self._stack(f"{ours}_scale", names, lead, shape, "F32", tile)
        if dtype == MXFP4:
            names = [f"{name}.weight_scale" for name in theirs]
            shape, tile = (rows, columns // BLOCK), (1, BLOCK)
            self._stack(f"{ours}_scale", names, lead, shape, MXFP4, tile)

    def vector(self, ours: str, theirs: str, size: int, dtype: str | None = None) -> None:
        self._stack(ours, [theirs], (), (size,), dtype or self.layout.other)

    def _stack(self, ours, names: list[str], lead, shape, dtype, tile=None) -> None:
        for name in names:
            self.tensors[name] = Declared(dtype, shape, ours)
        runs = tuple((Run(name, 0, shape[0]),) for name in names)
        self.parameters[ours] = Recipe(dtype, (*lead, *shape), runs, len(lead), tile)
