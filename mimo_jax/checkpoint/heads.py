"""Where the heads of attention's projections, and their FP8 scales, lie in released checkpoints."""

import itertools
from collections.abc import Iterable

from mimo_jax.checkpoint.layout import TILE, Run, tile_count
from mimo_jax.config import AttentionConfig
from mimo_jax.errors import MimoError


class Projection:
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
        """Rows of a head."""
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


class Fused(Projection):
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
        self.scales = {self.name: chunks * tile_count(self.chunk)}

    def place(self, letter: str, head: int) -> tuple[str, int]:
        """Tensor and first row of a head."""
        chunk, inside = self._inside(letter, head)
        return self.name, chunk * self.chunk + inside

    def scale(self, letter: str, head: int, row: int) -> tuple[str, int]:
        """Tensor and row of the scales of a head's row."""
        chunk, inside = self._inside(letter, head)
        return self.name, chunk * tile_count(self.chunk) + (inside + row) // TILE

    def _inside(self, letter: str, head: int) -> tuple[int, int]:
        """Chunk of a head, and its first row in the chunk."""
        chunk, place = divmod(head, self.counts[letter])
        return chunk, self.begins[letter] + place * self.size(letter)


class Split(Projection):
    """`q_proj`, `k_proj` and `v_proj`; if stacked, the tiles of each key head run on through V."""

    def __init__(self, prefix: str, config: AttentionConfig, stacked: bool, queries: bool = True):
        super().__init__(config)
        self.prefix, self.stacked = prefix, stacked
        self.letters = "qkv" if queries else "kv"
        kv, h, v = config.num_kv_heads, config.head_dim, config.v_head_dim
        heads = {"q": config.num_heads, "k": kv, "v": kv}
        rows = {letter: heads[letter] * self.size(letter) for letter in self.letters}
        tiles = {letter: tile_count(size) for letter, size in rows.items()}
        # Tiles of the stack of one key and one value head: those that begin in K, and the others.
        self.key_tiles, self.value_tiles = tile_count(h), tile_count(h + v) - tile_count(h)
        if stacked:
            tiles |= {"k": kv * self.key_tiles, "v": kv * self.value_tiles}
        self.tensors = {f"{prefix}{letter}_proj": size for letter, size in rows.items()}
        self.scales = {f"{prefix}{letter}_proj": size for letter, size in tiles.items() if size}

    def place(self, letter: str, head: int) -> tuple[str, int]:
        """Tensor and first row of a head."""
        return f"{self.prefix}{letter}_proj", head * self.size(letter)

    def scale(self, letter: str, head: int, row: int) -> tuple[str, int]:
        """Tensor and row of the scales of a head's row."""
        if not self.stacked or letter == "q":
            return f"{self.prefix}{letter}_proj", (head * self.size(letter) + row) // TILE
        tile = (row + (self.config.head_dim if letter == "v" else 0)) // TILE
        if tile < self.key_tiles:
            return f"{self.prefix}k_proj", head * self.key_tiles + tile
        return f"{self.prefix}v_proj", head * self.value_tiles + tile - self.key_tiles


def join(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Merges runs that follow one another in the same tensor."""
    joined: list[Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last and (last.tensor, last.stop, last.repeat) == (run.tensor, run.start, run.repeat):
            joined[-1] = last._replace(stop=run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def repeats(places: list[tuple[str, int]]) -> list[Run]:
    """One run for each row that is taken several times in turn."""
    return [
        Run(tensor, row, row + 1, len(list(same)))
        for (tensor, row), same in itertools.groupby(places)
    ]


def rows_of(runs: tuple[Run, ...]) -> int:
    """Rows that runs make."""
    return sum(run.rows for run in runs)
