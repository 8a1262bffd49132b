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
import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

from mimo_jax.config import FULL, SLIDING, AttentionConfig, DrafterConfig, ModelConfig
from mimo_jax.errors import MimoError

FP8, MXFP4 = "F8_E4M3", "U8"
PLAIN = ("BF16", "F32")
"""Stored dtypes, by their names in safetensors; `MXFP4` codes and scales are both `U8` bytes."""

BYTES = {FP8: 1, MXFP4: 1, "BF16": 2, "F32": 4}
TILE = 128
"""Rows and columns of the tiles of FP8 weights that share a scale."""

BLOCK = 32
"""Columns of MXFP4 weights that share a scale."""

SKIPPED = ("visual.", "audio_encoder.", "speech_embeddings.")
"""Beginnings of the names of tensors of other modalities, which this package does not read."""

DRAFTER_FOLDER = "dflash/"
MASK_EMBEDDING = DRAFTER_FOLDER + "mask_embedding.pt"
"""The drafter's tensors are listed under its folder: "dflash/fc.weight". The mask's embedding is
no tensor of a safetensors file: it lies in a file of its own, listed under this name."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a checkpoint stores a model. What the configuration says is not repeated here.

    Attributes:
      fused: whether attention is one `qkv_proj` in chunks, else `q_proj`, `k_proj` and `v_proj`.
      linear: dtype of attention's input projections and of dense MLPs, of the MTP layers too:
        `FP8` with a scale a tile, or a plain one.
      experts: `MXFP4`, `FP8` or a plain dtype.
      other: dtype of embedding, head, norms, sinks and output projections.
      stacked: whether FP8 scales of split K and V of full layers run through both.
      mtp_fused: `fused` for the MTP layers; as `fused` by default.
      drafter: dtype of the drafter; as `other` by default.
    """

    fused: bool
    linear: str
    experts: str
    other: str = "BF16"
    stacked: bool = True
    mtp_fused: bool | None = None
    drafter: str | None = None

    def __post_init__(self):
        if self.mtp_fused is None:
            object.__setattr__(self, "mtp_fused", self.fused)
        if self.drafter is None:
            object.__setattr__(self, "drafter", self.other)
        for name, allowed in (
            ("linear", (FP8, *PLAIN)),
            ("experts", (MXFP4, FP8, *PLAIN)),
            ("other", PLAIN),
            ("drafter", PLAIN),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise MimoError(
                    f"A checkpoint that stores {name} weights as {value!r} cannot be read; they "
                    f"must be one of {allowed}."
                )


LAYOUTS = {
    "v2-flash": Layout(fused=False, linear=FP8, experts=FP8),
    "v2.5": Layout(fused=True, linear=FP8, experts=FP8),
    "v2.6": Layout(fused=True, linear=FP8, experts=MXFP4),
    "split-bf16": Layout(fused=False, linear="BF16", experts="BF16"),
    "fused-bf16": Layout(fused=True, linear="BF16", experts="BF16"),
}
"""Layouts by name. "v2.5" is MiMo-V2.5's and V2.5-Pro's; "v2.6" is also V2.5-Pro-FP4-DFlash's,
whose router may be float32 (the configuration says it). The last two have no scales: bases, and
what transformers writes for MiMo-V2-Flash, whose names on disk are Xiaomi's split ones."""

RELEASES = {
    "mimo-v2-flash": "v2-flash",
    "mimo-v2.5": "v2.5",
    "mimo-v2.5-pro": "v2.5",
    "mimo-v2.6-flash": "v2.6",
    "mimo-v2.6-pro": "v2.6",
}
"""The layout in which each preset was released."""


class Declared(NamedTuple):
    """A stored tensor as it must be.

    Attributes:
      dtype: in safetensors' names.
      shape: as stored: two MXFP4 codes a byte.
      parameter: the one of ours that it is part of, such as "target.layers.0.attention.qkv_scale".
    """

    dtype: str
    shape: tuple[int, ...]
    parameter: str

    @property
    def elements(self) -> int:
        """Elements as stored."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return self.elements * BYTES[self.dtype]


class Run(NamedTuple):
    """Consecutive rows [start, stop) of a stored tensor, each taken `repeat` times in turn.

    Repeats occur in scales only, where one of a tile's serves several of our finer units. A vector
    counts as rows of one element.
    """

    tensor: str
    start: int
    stop: int
    repeat: int = 1

    @property
    def rows(self) -> int:
        """Rows that it makes."""
        return (self.stop - self.start) * self.repeat


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Which stored rows make a parameter of shape [*lead, rows, ...].

    Attributes:
      dtype: as stored, in safetensors' names.
      shape: of the parameter, in the stored form (two MXFP4 codes a byte).
      runs: for each index of the leading dimensions, in C order, the runs that make its rows.
      lead: number of leading dimensions.
      tile: of scales: rows and columns of the weight that one value scales (the last tile of each
        may be cut off); None for everything else. The scales of a parameter have its name and
        "_scale".
    """

    dtype: str
    shape: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]
    lead: int = 0
    tile: tuple[int, int] | None = None


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


class Piece(NamedTuple):
    """Where rows [start, stop) of a stored tensor lie among our parameters.

    Attributes:
      start: first row of the stored tensor.
      stop: past its last row.
      parameter: which of ours.
      index: leading index in it.
      row: of its rows there, the first.
      repeat: rows of ours for one stored row; of scales all of them are equal, or the parameter
        does not fit this layout.
    """

    start: int
    stop: int
    parameter: str
    index: int
    row: int
    repeat: int


def backwards(table: dict[str, Recipe]) -> dict[str, list[Piece]]:
    """`recipes` turned around: for each stored tensor the pieces that fill it, by `start`.

    A row of scales may be filled by several pieces: units of one tile, which must then be equal.
    """
    found: dict[str, list[Piece]] = {}
    for name, recipe in table.items():
        for index, runs in enumerate(recipe.runs):
            row = 0
            for run in runs:
                piece = Piece(run.start, run.stop, name, index, row, run.repeat)
                found.setdefault(run.tensor, []).append(piece)
                row += run.rows
    return {tensor: sorted(pieces, key=lambda p: p.start) for tensor, pieces in found.items()}


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
    rows = attention.num_kv_heads * _tiles(attention.head_dim)
    plain = _tiles(attention.num_kv_heads * attention.head_dim)
    for layer in (i for i, kind in enumerate(config.hybrid_layer_pattern) if kind == FULL):
        scale = tensors.get(f"model.layers.{layer}.self_attn.k_proj.weight_scale_inv")
        if scale is not None and rows != plain:
            return tuple(scale.shape)[:1] != (plain,)
    return True


def _tiles(size: int, tile: int = TILE) -> int:
    return -(-size // tile)


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
            kv = _Split(theirs, attention, stacked=False, queries=False)
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
            stored = _Fused(theirs, attention, config.num_key_value_heads)
        else:
            stored = _Split(theirs, attention, kind == FULL and self.layout.stacked)
        self.heads(f"{ours}qkv", stored, d, self.layout.linear)
        columns = n * attention.v_head_dim
        self.matrices(f"{ours}output", [f"{theirs}o_proj"], (), d, columns, self.layout.other)
        if attention.sink:
            self.vector(f"{ours}sink", f"{theirs}attention_sink_bias", n)

    def heads(self, ours: str, stored: "_Projection", d: int, dtype: str) -> None:
        """A projection to heads, grouped by key/value head as our modules have it."""
        count = max(self.shards, stored.config.num_kv_heads)
        groups = [stored.group(index, count) for index in range(count)]
        for name, rows in stored.tensors.items():
            self.tensors[f"{name}.weight"] = Declared(dtype, (rows, d), ours)
        runs = tuple(_join(stored.run(letter, head) for letter, head in group) for group in groups)
        self.parameters[ours] = Recipe(dtype, (count, _rows(runs[0]), d), runs, 1)
        if dtype != FP8:
            return
        ours, columns, unit = f"{ours}_scale", _tiles(d), stored.config.scale_unit
        for name, rows in stored.scales.items():
            self.tensors[f"{name}.weight_scale_inv"] = Declared("F32", (rows, columns), ours)
        runs = tuple(_join(_repeats(stored.scale_places(group, unit))) for group in groups)
        shape = (count, _rows(runs[0]), columns)
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
            shape, tile = (_tiles(rows), _tiles(columns)), (TILE, TILE)
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


class _Projection:
    """Where the heads of one layer's query, key and value projections lie.

    `tensors` and `scales` have the rows of each stored tensor, by name without "weight".
    """

    tensors: dict[str, int]
    scales: dict[str, int]
    letters = "qkv"

    def __init__(self, config: AttentionConfig):
        self.config = config

    def place(self, letter: str, head: int) -> tuple[str, int]:
        """Tensor and first row of a head."""
        raise NotImplementedError

    def scale(self, letter: str, head: int, row: int) -> tuple[str, int]:
        """Tensor and row of the scales of a head's row."""
        raise NotImplementedError

    def size(self, letter: str) -> int:
        """Rows of a head."""
        return self.config.v_head_dim if letter == "v" else self.config.head_dim

    def run(self, letter: str, head: int) -> Run:
        tensor, row = self.place(letter, head)
        return Run(f"{tensor}.weight", row, row + self.size(letter))

    def group(self, index: int, count: int) -> list[tuple[str, int]]:
        """Heads of one of `count` groups: its share of queries, its key head, its value head."""
        share = self.config.num_heads // count
        shared = index * self.config.num_kv_heads // count
        queries = [("q", head) for head in range(index * share, (index + 1) * share)]
        return [*(queries if "q" in self.letters else ()), ("k", shared), ("v", shared)]

    def scale_places(self, group: list[tuple[str, int]], unit: int) -> list[tuple[str, int]]:
        """Tensor and row of the scales of each unit of a group's rows."""
        places = (
            self.scale(letter, head, row)
            for letter, head in group
            for row in range(0, self.size(letter), unit)
        )
        return [(f"{tensor}.weight_scale_inv", row) for tensor, row in places]


class _Fused(_Projection):
    """One `qkv_proj` in chunks, each with a grid of scales of its own."""

    def __init__(self, prefix: str, config: AttentionConfig, chunks: int):
        super().__init__(config)
        heads, kv, h, v = config.num_heads, config.num_kv_heads, config.head_dim, config.v_head_dim
        if heads % chunks or kv % chunks:
            raise MimoError(
                f"{prefix}qkv_proj is stored as num_key_value_heads={chunks} chunks, which {heads} "
                f"query and {kv} key/value heads do not divide into."
            )
        self.name = f"{prefix}qkv_proj"
        self.counts = {"q": heads // chunks, "k": kv // chunks, "v": kv // chunks}
        keys = self.counts["q"] * h
        self.begins = {"q": 0, "k": keys, "v": keys + self.counts["k"] * h}
        self.chunk = self.begins["v"] + self.counts["v"] * v
        self.tensors = {self.name: chunks * self.chunk}
        self.scales = {self.name: chunks * _tiles(self.chunk)}

    def place(self, letter: str, head: int) -> tuple[str, int]:
        chunk, inside = self._inside(letter, head)
        return self.name, chunk * self.chunk + inside

    def scale(self, letter: str, head: int, row: int) -> tuple[str, int]:
        chunk, inside = self._inside(letter, head)
        return self.name, chunk * _tiles(self.chunk) + (inside + row) // TILE

    def _inside(self, letter: str, head: int) -> tuple[int, int]:
        """Chunk of a head, and its first row in the chunk."""
        chunk, place = divmod(head, self.counts[letter])
        return chunk, self.begins[letter] + place * self.size(letter)


class _Split(_Projection):
    """`q_proj`, `k_proj` and `v_proj`; if stacked, the tiles of each key head run on through V."""

    def __init__(self, prefix: str, config: AttentionConfig, stacked: bool, queries: bool = True):
        super().__init__(config)
        self.prefix, self.stacked = prefix, stacked
        self.letters = "qkv" if queries else "kv"
        kv, h, v = config.num_kv_heads, config.head_dim, config.v_head_dim
        heads = {"q": config.num_heads, "k": kv, "v": kv}
        rows = {letter: heads[letter] * self.size(letter) for letter in self.letters}
        tiles = {letter: _tiles(size) for letter, size in rows.items()}
        # Tiles of the stack of one key and one value head: those that begin in K, and the others.
        self.key_tiles, self.value_tiles = _tiles(h), _tiles(h + v) - _tiles(h)
        if stacked:
            tiles |= {"k": kv * self.key_tiles, "v": kv * self.value_tiles}
        self.tensors = {f"{prefix}{letter}_proj": size for letter, size in rows.items()}
        self.scales = {f"{prefix}{letter}_proj": size for letter, size in tiles.items() if size}

    def place(self, letter: str, head: int) -> tuple[str, int]:
        return f"{self.prefix}{letter}_proj", head * self.size(letter)

    def scale(self, letter: str, head: int, row: int) -> tuple[str, int]:
        if not self.stacked or letter == "q":
            return f"{self.prefix}{letter}_proj", (head * self.size(letter) + row) // TILE
        tile = (row + (self.config.head_dim if letter == "v" else 0)) // TILE
        if tile < self.key_tiles:
            return f"{self.prefix}k_proj", head * self.key_tiles + tile
        return f"{self.prefix}v_proj", head * self.value_tiles + tile - self.key_tiles


def _join(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Merges runs that follow one another in the same tensor."""
    joined: list[Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last and (last.tensor, last.stop, last.repeat) == (run.tensor, run.start, run.repeat):
            joined[-1] = last._replace(stop=run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def _repeats(places: list[tuple[str, int]]) -> list[Run]:
    """One run for each row that is taken several times in turn."""
    return [
        Run(tensor, row, row + 1, len(list(same)))
        for (tensor, row), same in itertools.groupby(places)
    ]


def _rows(runs: tuple[Run, ...]) -> int:
    return sum(run.rows for run in runs)
