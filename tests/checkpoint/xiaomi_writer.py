"""Writes small checkpoints as Xiaomi's are stored, from public facts alone: slow loops, no table.

`write` draws random weights, stores them in one of `RELEASES`' ways and returns exactly the values
that are stored, under the names of split projections, plus what was written, byte for byte. Nothing
here uses the package under test.
"""

import json
import math
import pathlib

import ml_dtypes
import numpy as np
from test_torch_file import Storage, Tensor, dump, make_torch
from test_torch_file import write as write_torch

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
DTYPES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.uint8): "U8",
    np.dtype(BF16): "BF16",
    np.dtype(E4M3): "F8_E4M3",
}

# Real head sizes: a chunk of a full layer has 4 x 192 + 192 + 128 = 1088 rows, eight and a half
# tiles, and its K ends in the middle of one; a sliding layer's has 9 whole ones.
CONFIG = {
    "architectures": ["MiMoV2ForCausalLM"],
    "model_type": "mimo_v2",
    "vocab_size": 320,
    "hidden_size": 288,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "swa_num_attention_heads": 8,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 4,
    "head_dim": 192,
    "swa_head_dim": 192,
    "v_head_dim": 128,
    "swa_v_head_dim": 128,
    "hybrid_layer_pattern": [0, 1, 0],
    "moe_layer_freq": [0, 1, 1],
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "n_routed_experts": 11,
    "num_experts_per_tok": 3,
    "partial_rotary_factor": 0.334,
    "rope_theta": 5000,
    "swa_rope_theta": 100,
    "sliding_window": 9,
    "sliding_window_size": 9,
    "max_position_embeddings": 96,
    "layernorm_epsilon": 1e-5,
    "attention_value_scale": 0.707,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": None,
    "routed_scaling_factor": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "eos_token_id": 5,
    "dtype": "bfloat16",
}
DRAFTER = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "vocab_size": 304,
    "hidden_size": 288,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "v_head_dim": 24,
    "intermediate_size": 328,
    "block_size": 5,
    "mask_token_id": 301,
    "target_layer_ids": [0, 1, 2],
    "rope_theta": 10000,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "sliding_window": 14,
    "use_swa": True,
    "is_causal": False,
    "attention_value_scale": 0.612,
    "add_swa_attention_sink_bias": True,
    "backbone_rotary_base": 5000000,
}
RELEASES = {
    # fused attention, dense dtype, expert dtype, router dtype
    "v2-flash": (False, E4M3, E4M3, np.float32),
    "v2.5": (True, E4M3, E4M3, np.float32),
    "v2.5-fp4": (True, E4M3, np.uint8, np.float32),
    "v2.6": (True, E4M3, np.uint8, BF16),
    "bf16": (False, BF16, BF16, np.float32),
    "fused-bf16": (True, BF16, BF16, np.float32),
}
MTP_LAYERS = 2
MISTAKES = (
    "flat qkv on sliding layers",
    "flat qkv",
    "scales of each segment",
    "high nibble first",
    "bias in bf16",
    "missing tensor",
    "surplus tensor",
)


class Writer:
    """One checkpoint: `values` are exact weights by split names, `stored` the files' tensors."""

    def __init__(self, release: str, rng: np.random.Generator, mistake: str | None = None):
        assert mistake is None or mistake in MISTAKES
        self.fused, self.dense, self.expert, self.router = RELEASES[release]
        self.release, self.rng, self.mistake = release, rng, mistake
        self.values: dict[str, np.ndarray] = {}
        self.stored: dict[str, np.ndarray] = {}

    def matrix(self, rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        # Magnitudes differ from tile to tile and row to row, so that no scale fits another tile.
        size = np.exp(self.rng.uniform(-0.7, 0.7, (rows, 1)))
        w = self.rng.standard_normal((rows, columns)) * size * gain / math.sqrt(columns)
        return w.astype(np.float32)

    def keep(self, name: str, value: np.ndarray, dtype) -> None:
        """A tensor stored as it is, rounded to a float dtype."""
        self.stored[name] = value.astype(dtype)
        self.values[name] = self.stored[name].astype(np.float32)

    def linear(self, name: str, value: np.ndarray, dtype) -> None:
        """A tensor with plain tiles, MXFP4 blocks, or none."""
        if dtype == E4M3:
            rows = [(row // 128,) for row in range(len(value))]
            codes, scales, exact = quantize_rows(value, rows)
            self.stored[f"{name}.weight"] = codes
            table = [scales[(i,)] for i in range(math.ceil(len(value) / 128))]
            self.stored[f"{name}.weight_scale_inv"] = np.stack(table)
            self.values[f"{name}.weight"] = exact
        elif dtype == np.uint8:
            self.mxfp4(name, value.shape)
        else:
            self.keep(f"{name}.weight", value, dtype)

    def mxfp4(self, name: str, shape) -> None:
        """Random nibbles and random e8m0 scales: every value that there is."""
        rows, columns = shape
        nibbles = self.rng.integers(0, 16, (rows, columns), dtype=np.uint8)
        scales = self.rng.integers(119, 124, (rows, columns // 32), dtype=np.uint8)
        magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        table = np.array(magnitudes + [-m for m in magnitudes], np.float32)
        exact = table[nibbles]
        for block in range(columns // 32):
            exact[:, 32 * block : 32 * block + 32] *= 2.0 ** (
                scales[:, [block]].astype(float) - 127
            )
        even, odd = nibbles[:, 0::2], nibbles[:, 1::2]
        if self.mistake == "high nibble first":
            even, odd = odd, even
        self.stored[f"{name}.weight"] = even + odd * np.uint8(16)
        self.stored[f"{name}.weight_scale"] = scales
        self.values[f"{name}.weight"] = exact

    def attention(self, prefix: str, sliding: bool) -> None:
        c = CONFIG
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        kv = c["swa_num_key_value_heads"] if sliding else kv
        h, v, d = c["head_dim"], c["v_head_dim"], c["hidden_size"]
        parts = {
            "q": self.matrix(heads * h, d, 2.0),
            "k": self.matrix(kv * h, d, 2.0),
            "v": self.matrix(kv * v, d),
        }
        if self.fused:
            self.fused_qkv(prefix, parts, heads, kv, sliding)
        else:
            self.split_qkv(prefix, parts, kv, sliding)
        self.keep(f"{prefix}o_proj.weight", self.matrix(d, heads * v), BF16)
        if sliding:
            self.keep(f"{prefix}attention_sink_bias", self.rng.uniform(-1, 3, heads), BF16)

    def fused_qkv(self, prefix, parts, heads, kv, sliding) -> None:
        chunks, order = CONFIG["num_key_value_heads"], []
        sizes = {"q": CONFIG["head_dim"], "k": CONFIG["head_dim"], "v": CONFIG["v_head_dim"]}
        counts = {"q": heads // chunks, "k": kv // chunks, "v": kv // chunks}
        tiles = math.ceil(sum(counts[p] * sizes[p] for p in "qkv") / 128)
        for chunk in range(chunks):
            position = 0
            for part in "qkv":
                for row in range(counts[part] * sizes[part]):
                    source = chunk * counts[part] * sizes[part] + row
                    order.append((part, source, chunk * tiles + position // 128))
                    position += 1
        if self.mistake == "scales of each segment":
            order, tiles = segmented(order, counts, sizes, chunks)
        if self.mistake == "flat qkv" or self.mistake == "flat qkv on sliding layers" and sliding:
            order = sorted(order, key=lambda place: "qkv".index(place[0]))
            if self.mistake == "flat qkv":
                order = [(part, row, (part, row // 128)) for part, row, _ in order]
            else:
                order = [(p, r, i // 128) for i, (p, r, _) in enumerate(order)]
        stacked = np.stack([parts[part][row] for part, row, _ in order])
        name = f"{prefix}qkv_proj"
        if self.dense == E4M3:
            codes, scales, stacked = quantize_rows(stacked, [place for _, _, place in order])
            self.stored[f"{name}.weight"] = codes
            table = list(dict(sorted(scales.items(), key=lambda i: first(order, i[0]))).values())
            table += [table[-1]] * (chunks * tiles - len(table))
            self.stored[f"{name}.weight_scale_inv"] = np.stack(table)
        else:
            self.stored[f"{name}.weight"] = stacked.astype(BF16)
            stacked = self.stored[f"{name}.weight"].astype(np.float32)
        for part in "qkv":
            exact = np.empty_like(parts[part])
            for (p, row, _), value in zip(order, stacked, strict=True):
                if p == part:
                    exact[row] = value
            self.values[f"{prefix}{part}_proj.weight"] = exact

    def split_qkv(self, prefix, parts, kv, sliding) -> None:
        if self.dense != E4M3 or sliding:
            for part, value in parts.items():
                self.linear(f"{prefix}{part}_proj", value, self.dense)
            return
        self.linear(f"{prefix}q_proj", parts["q"], self.dense)
        h, v = CONFIG["head_dim"], CONFIG["v_head_dim"]
        codes, scales, exact = {}, {"k": [], "v": []}, {"k": [], "v": []}
        codes = {"k": [], "v": []}
        for head in range(kv):
            k, value = parts["k"][head * h :][:h], parts["v"][head * v :][:v]
            stack = np.concatenate([k, value])
            c, s, e = quantize_rows(stack, [row // 128 for row in range(h + v)])
            for tile in sorted(s):
                # The scales of a tile lie with the tensor in which the tile begins.
                scales["k" if tile * 128 < h else "v"].append(s[tile])
            codes["k"].append(c[:h])
            codes["v"].append(c[h:])
            exact["k"].append(e[:h])
            exact["v"].append(e[h:])
        for part in "kv":
            name = f"{prefix}{part}_proj.weight"
            self.stored[name] = np.concatenate(codes[part])
            self.stored[f"{name}_scale_inv"] = np.stack(scales[part])
            self.values[name] = np.concatenate(exact[part])

    def mlp(self, prefix: str, width: int, dtype) -> None:
        d = CONFIG["hidden_size"]
        self.linear(f"{prefix}gate_proj", self.matrix(width, d, 2.0), dtype)
        self.linear(f"{prefix}up_proj", self.matrix(width, d, 2.0), dtype)
        self.linear(f"{prefix}down_proj", self.matrix(d, width), dtype)

    def norms(self, prefix: str, names: str, size: int) -> None:
        for name in names.split():
            self.keep(f"{prefix}{name}.weight", self.rng.uniform(0.5, 1.5, size), BF16)

    def target(self) -> None:
        c, d = CONFIG, CONFIG["hidden_size"]
        self.keep("model.embed_tokens.weight", self.rng.standard_normal((c["vocab_size"], d)), BF16)
        self.keep("lm_head.weight", self.matrix(c["vocab_size"], d, 3.0), BF16)
        self.norms("model.", "norm", d)
        for layer in range(c["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            self.norms(prefix, "input_layernorm post_attention_layernorm", d)
            self.attention(f"{prefix}self_attn.", c["hybrid_layer_pattern"][layer] == 1)
            prefix += "mlp."
            if not c["moe_layer_freq"][layer]:
                self.mlp(prefix, c["intermediate_size"], self.dense)
                continue
            e = c["n_routed_experts"]
            self.keep(f"{prefix}gate.weight", self.matrix(e, d, 2.0), self.router)
            wide = np.float32 if self.mistake != "bias in bf16" else BF16
            bias = self.rng.uniform(0.5, 1.5, e)
            self.keep(f"{prefix}gate.e_score_correction_bias", bias, wide)
            for expert in range(e):
                self.mlp(f"{prefix}experts.{expert}.", c["moe_intermediate_size"], self.expert)

    def mtp(self) -> None:
        d = CONFIG["hidden_size"]
        for layer in range(MTP_LAYERS):
            prefix = f"model.mtp.layers.{layer}."
            names = "enorm hnorm input_layernorm pre_mlp_layernorm final_layernorm"
            self.norms(prefix, names, d)
            self.keep(f"{prefix}eh_proj.weight", self.matrix(d, 2 * d), BF16)
            self.attention(f"{prefix}self_attn.", True)
            self.mlp(f"{prefix}mlp.", CONFIG["intermediate_size"], self.dense)

    def drafter(self) -> "Writer":
        """The drafter's tensors, in a writer of their own."""
        own, c = Writer("bf16", self.rng), DRAFTER
        d, n, kv, h = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], 24
        own.keep("fc.weight", own.matrix(d, len(c["target_layer_ids"]) * d), BF16)
        own.norms("", "hidden_norm norm", d)
        for layer in range(c["num_hidden_layers"]):
            prefix = f"layers.{layer}."
            own.norms(prefix, "input_layernorm post_attention_layernorm", d)
            own.norms(f"{prefix}self_attn.", "q_norm k_norm", h)
            for name, rows, columns in (
                ("q_proj", n * h, d),
                ("k_proj", kv * h, d),
                ("v_proj", kv * h, d),
                ("o_proj", d, n * h),
            ):
                own.keep(f"{prefix}self_attn.{name}.weight", own.matrix(rows, columns), BF16)
            own.keep(f"{prefix}self_attn.attention_sink_bias", self.rng.uniform(-1, 3, n), BF16)
            for name, rows, columns in (
                ("gate_proj", c["intermediate_size"], d),
                ("up_proj", c["intermediate_size"], d),
                ("down_proj", d, c["intermediate_size"]),
            ):
                own.keep(f"{prefix}mlp.{name}.weight", own.matrix(rows, columns), BF16)
        own.values["mask_embedding"] = self.rng.standard_normal(d).astype(BF16).astype(np.float32)
        return own

    def write(self, folder: pathlib.Path, drafter: bool = True) -> dict[str, np.ndarray]:
        """Writes everything; returns the drafter's values."""
        folder.mkdir(parents=True, exist_ok=True)
        self.target()
        if self.release != "bf16":
            self.mtp()
        if self.mistake == "missing tensor":
            del self.stored["model.layers.1.mlp.experts.10.up_proj.weight"]
        if self.mistake == "surplus tensor":
            self.stored["model.layers.3.input_layernorm.weight"] = np.ones(3, BF16)
        if self.release in ("v2.5", "v2.6"):
            for name in ("visual.blocks.0.attn.sinks", "audio_encoder.x", "speech_embeddings.0.w"):
                self.stored[name] = np.ones((2, 3), BF16)
        write_shards(folder, self.stored, CONFIG["num_key_value_heads"])
        (folder / "config.json").write_text(json.dumps(self.config()))
        if not drafter:
            return {}
        draft = self.drafter()
        write_dflash(folder / "dflash", draft, comma=self.release == "v2.5-fp4")
        return draft.values

    def config(self) -> dict:
        """config.json, with what this release has in it."""
        fields = dict(CONFIG)
        if self.fused:
            fields["attention_projection_layout"] = "fused_qkv"
        if self.dense == E4M3:
            quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
            if self.expert == np.uint8:
                quantization |= {"store_dtype": "mxfp4", "mxfp4_block_size": 32}
            fields["quantization_config"] = quantization
        if self.release == "v2.6":
            fields |= {"moe_router_dtype": "bfloat16", "num_nextn_predict_layers": MTP_LAYERS}
            fields |= {"vision_config": {"depth": 28}, "audio_config": {}}
        return fields


def quantize_rows(values: np.ndarray, places: list) -> tuple[np.ndarray, dict, np.ndarray]:
    """FP8 tiles over the rows that have the same place, 128 columns wide.

    Returns:
      codes, the row of scales of each place, and the exact values.
    """
    groups: dict = {}
    for row, place in enumerate(places):
        groups.setdefault(place, []).append(row)
    width = math.ceil(values.shape[1] / 128)
    codes, exact = np.empty(values.shape, E4M3), np.empty(values.shape, np.float32)
    scales = {place: np.empty(width, np.float32) for place in groups}
    for place, rows in groups.items():
        for tile in range(width):
            at = np.ix_(rows, range(128 * tile, min(128 * tile + 128, values.shape[1])))
            scale = np.float32(np.abs(values[at]).max() / 448)
            codes[at] = (values[at] / scale).astype(E4M3)
            exact[at] = codes[at].astype(np.float32) * scale
            scales[place][tile] = scale
    return codes, scales, exact


def segmented(order, counts, sizes, chunks):
    """The wrong grid: it begins anew at Q, at K and at V of each chunk."""
    tiles = {part: math.ceil(counts[part] * sizes[part] / 128) for part in "qkv"}
    begins = {"q": 0, "k": tiles["q"], "v": tiles["q"] + tiles["k"]}
    total = sum(tiles.values())
    out = []
    for part, source, _ in order:
        chunk, row = divmod(source, counts[part] * sizes[part])
        out.append((part, source, chunk * total + begins[part] + row // 128))
    return out, total


def first(order, place) -> int:
    """The first row of a place: places come in the order of their rows."""
    return next(i for i, (_, _, p) in enumerate(order) if p == place)


def write_shards(folder: pathlib.Path, tensors: dict[str, np.ndarray], tp_size: int) -> None:
    """Five files, names sorted as strings, a weight and its scale often in different ones."""
    names = sorted(tensors)
    files = [f"model_pp0_ep{i}_shard0.safetensors" for i in range(4)] + ["model_mtp.safetensors"]
    weight_map = {}
    for number, name in enumerate(names):
        weight_map[name] = files[4 if ".mtp." in name else number % 4]
    for file in files:
        own = {n: tensors[n] for n in names if weight_map[n] == file}
        if own:
            write_safetensors(folder / file, own)
    index = {"metadata": {"tp_size": tp_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    header, end = {}, 0
    for name, array in tensors.items():
        offsets = [end, end + array.nbytes]
        header[name] = {
            "dtype": DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": offsets
        }  # fmt: skip
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(array.tobytes())


def write_dflash(folder: pathlib.Path, draft: Writer, comma: bool) -> None:
    folder.mkdir()
    write_safetensors(folder / "dflash_draft_model.safetensors", draft.stored)
    weight_map = dict.fromkeys(draft.stored, "dflash_draft_model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = json.dumps(DRAFTER, indent=1)
    # Early revisions end with a comma.
    (folder / "config.json").write_text(text.replace("\n}", ",\n}") if comma else text)
    mask, torch = draft.values["mask_embedding"].astype(BF16), make_torch()
    tensor = Tensor(torch, Storage(torch.BFloat16Storage, "0", len(mask)), 0, (len(mask),))
    value = {"mask_token_id": DRAFTER["mask_token_id"], "embedding": tensor}
    write_torch(folder / "mask_embedding.pt", dump(torch, value), mask.tobytes())
