"""What measurements of mimo-nano need: its tokenizer, held-out text and prompts.

    python -m mimo_jax.train.data --corpus .corpus --out checkpoints/mimo-nano

trains the tokenizer and writes what measurements need: `tokenizer.json`, `heldout_prompts.jsonl`
(prompts of exactly 256 tokens, each from another held-out file where there are enough),
`heldout.txt.xz` (whole held-out files, for bits per byte), `heldout_licences.txt` (theirs) and
`corpus.json` (the corpus's manifest, and the sizes of what is shipped).
"""

import argparse
import json
import lzma
import zipfile
from pathlib import Path

import numpy as np

from mimo_jax.errors import MimoError
from mimo_jax.text.tokenizer import Tokenizer, train_tokenizer
from mimo_jax.train.corpus import Document, find_wheel, read_archive, write_archive
from mimo_jax.train.corpus_sources import HELD_OUT
from mimo_jax.train.sources import pack

PROMPT_TOKENS = 256


def choose_prompts(
    texts: list[str], files: list[str], tokenizer: Tokenizer, count: int, seed: int
) -> list[dict]:
    """Chooses prompts of exactly 256 tokens, each starting where a function or class does.

    Args:
      texts: of held-out documents.
      files: where each comes from.
      tokenizer: the model's.
      count: prompts wanted; packages take turns, and a file gives a second one only
        when all have given one.
      seed: of the choice.

    Returns:
      A record for each prompt: file, line (from 1) and text; encoding the text gives the tokens.

    Raises:
      MimoError: if there are not so many.
    """
    random = np.random.default_rng(seed)
    queues = [random.permutation(_definitions(text)).tolist() for text in texts]
    order = _by_turns(files, random)
    chosen: list[dict] = []
    while len(chosen) < count and any(queues):
        for index in order:
            record = _next_prompt(texts[index], queues[index], tokenizer)
            if record and len(chosen) < count:
                chosen.append({"file": files[index], **record})
    if len(chosen) < count:
        raise MimoError(
            f"Only {len(chosen)} of {count} prompts could be made of {len(texts)} files: "
            "ask for fewer, or hold out more text."
        )
    return chosen


def _by_turns(files: list[str], random: np.random.Generator) -> list[int]:
    """Indices of the files, mixed, one of each package in turn as long as it has any."""
    turns: dict[str, int] = {}
    ranked = []
    for index in random.permutation(len(files)).tolist():
        package = files[index].split("/")[0]
        turns[package] = turns.get(package, 0) + 1
        ranked.append((turns[package], index))
    return [index for _, index in sorted(ranked, key=lambda pair: pair[0])]


def _definitions(text: str) -> list[int]:
    """Numbers from 0 of the lines on which a top-level function or class begins."""
    lines = text.splitlines()
    return [n for n, line in enumerate(lines) if line.startswith(("def ", "class ", "async def "))]


def _next_prompt(text: str, queue: list[int], tokenizer: Tokenizer) -> dict | None:
    """The prompt at the first line of the queue that makes one; takes lines off the queue."""
    lines = text.splitlines(keepends=True)
    while queue:
        line = queue.pop()
        # Few tokens are longer than 16 characters: enough text for 256 tokens.
        rest = "".join(lines[line:])[: 16 * PROMPT_TOKENS]
        ids = tokenizer.encode(rest)[:PROMPT_TOKENS]
        prompt = tokenizer.decode(ids)
        # Cut in the middle, text may be tokenised in another way, or be no text at all.
        if len(ids) == PROMPT_TOKENS and tokenizer.encode(prompt) == ids:
            return {"line": line + 1, "text": prompt}
    return None


def write_heldout(corpus: Path, out: Path, tokenizer: Tokenizer, size: int, prompts: int) -> dict:
    """Writes heldout_prompts.jsonl and heldout.txt.xz; returns their figures.

    Args:
      corpus: the folder of `mimo_jax.train.corpus`.
      out: the checkpoint's folder.
      tokenizer: the model's.
      size: bytes of held-out text wanted; whole files, at most an eighth of the size each.
      prompts: how many.

    Raises:
      MimoError: if the corpus is missing, or too small for the prompts.
    """
    texts = read_archive(corpus / "heldout.txt.xz")
    files = json.loads((corpus / "heldout_files.json").read_text())
    records = choose_prompts(texts, files, tokenizer, prompts, seed=0)
    lines = [json.dumps(record) for record in records]
    (out / "heldout_prompts.jsonl").write_text("\n".join(lines) + "\n")

    chosen, total = [], 0
    for index in _by_turns(files, np.random.default_rng(1)):
        length = len(texts[index].encode())
        if length <= size // 8 and total + length <= size:
            total += length
            chosen.append(Document("", files[index], texts[index]))
    write_archive(out / "heldout.txt.xz", chosen)
    plain = "".join(document.text for document in chosen).encode()
    return {
        "prompts": len(records),
        "prompt_files": len({record["file"] for record in records}),
        "heldout_files": [document.path for document in chosen],
        "heldout_bytes": len(plain),
        "heldout_tokens": len(pack((document.text for document in chosen), tokenizer).ids),
        "xz_bits_per_byte": round(8 * len(lzma.compress(plain, preset=9)) / len(plain), 4),
    }


def heldout_notices(wheels: Path) -> str:
    """The licences and notices of the held-out packages, which text shipped from them asks for.

    Raises:
      MimoError: if a package's wheel is not in the folder.
    """
    parts = []
    for pin in HELD_OUT:
        path = find_wheel(pin, wheels)
        if path is None:
            raise MimoError(f"No wheel of {pin} in {wheels}: run mimo_jax.train.corpus first.")
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if ".dist-info/" in n]
            names = [n for n in names if n.rsplit("/", 1)[-1].startswith(("LICENSE", "NOTICE"))]
            parts += [f"==== {pin}\n\n{archive.read(n).decode().strip()}\n" for n in sorted(names)]
    return "\n".join(parts)


def sample_texts(texts: list[str], size: int, seed: int) -> list[str]:
    """Whole texts chosen at random, of about `size` characters together."""
    chosen, total = [], 0
    for index in np.random.default_rng(seed).permutation(len(texts)):
        if total >= size:
            break
        chosen.append(texts[index])
        total += len(texts[index])
    return chosen


def main() -> None:
    """Trains the tokenizer, and writes it with the held-out prompts and text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, default=Path(".corpus"))
    parser.add_argument("--out", type=Path, default=Path("checkpoints/mimo-nano"))
    parser.add_argument("--vocabulary", type=int, default=3072)
    parser.add_argument("--sample", type=int, default=40_000_000, help="characters to train it on")
    parser.add_argument("--heldout", type=int, default=1_000_000, help="bytes of text to ship")
    parser.add_argument("--prompts", type=int, default=128)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    notices = heldout_notices(options.corpus / "archives")
    (options.out / "heldout_licences.txt").write_text(notices)
    sample = sample_texts(read_archive(options.corpus / "train.txt.xz"), options.sample, seed=0)
    backend = train_tokenizer(iter(sample), options.vocabulary)
    backend.save(str(options.out / "tokenizer.json"))
    figures = write_heldout(
        options.corpus, options.out, Tokenizer(backend), options.heldout, options.prompts
    )
    manifest = json.loads((options.corpus / "manifest.json").read_text())
    (options.out / "corpus.json").write_text(json.dumps(manifest | {"shipped": figures}) + "\n")
    print(json.dumps({key: value for key, value in figures.items() if key != "heldout_files"}))


if __name__ == "__main__":
    main()
