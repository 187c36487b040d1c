"""What a process needs to tokenize a set that is larger than memory: its peak, by the size of the set.

    python -m bench.large_data [--gigabytes 20] [--record-bytes 4000] [--text-bytes 100] [--suffix .jsonl] [--dir DIR]

Draws the set into DIR, runs ``dist-lora data`` on it, and prints the command's peak, which includes what it has mapped; a set of a
hundredth of the size comes first, so that one can see what grows. Tokenizers take a second for a few megabytes, so of each record
only ``--text-bytes`` are tokenized, and the rest is a column that isn't used; with as many as the record has, all of it is text.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORD_BYTES, NUM_WORDS = 16, 500
FILLER_BYTES = 10**6
TEXT_END = "<|end_of_text|>"
SIZES = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip


def words() -> list[str]:
    """The vocabulary: words to which a blank is added."""
    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=WORD_BYTES - 1)) for _ in range(NUM_WORDS)]


def write_model(folder: Path) -> None:
    """A model's config.json and a tokenizer of these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*words(), TEXT_END])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=TEXT_END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=TEXT_END).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(SIZES))


def records(num_bytes: int, record_bytes: int, text_bytes: int) -> Iterator[tuple[str, str]]:
    """Texts, each with what lies beside it: half to one and a half times as many bytes, and in all ``num_bytes``."""
    draw, vocabulary = random.Random(1), words()
    filler = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz ", k=FILLER_BYTES))
    while num_bytes > 0:
        size = draw.randint(record_bytes // 2, record_bytes * 3 // 2)
        text = " ".join(draw.choices(vocabulary, k=max(1, size * text_bytes // record_bytes // WORD_BYTES)))
        at, rest = draw.randrange(FILLER_BYTES // 2), max(0, size - len(text))
        yield text, filler[at : at + rest]
        num_bytes -= size


def write_set(path: Path, drawn: Iterator[tuple[str, str]]) -> int:
    """Writes the set; returns the number of its records."""
    if path.suffix == ".parquet":
        return _write_parquet(path, drawn)
    count = 0
    with path.open("w") as file:
        file.write({".json": "[", ".csv": "text,beside\n"}.get(path.suffix, ""))
        for text, beside in drawn:
            comma = "," if path.suffix == ".json" and count else ""
            line = f"{text},{beside}" if path.suffix == ".csv" else f'{comma}{{"text": "{text}", "beside": "{beside}"}}'
            file.write(f"{line}\n")
            count += 1
        file.write("]" if path.suffix == ".json" else "")
    return count


def _write_parquet(path: Path, drawn: Iterator[tuple[str, str]]) -> int:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("text", pyarrow.string()), ("beside", pyarrow.string())])
    count = 0
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while some := list(itertools.islice(drawn, 10_000)):
            writer.write_table(pyarrow.table(list(zip(*some, strict=True)), schema=schema))
            count += len(some)
    return count


def measure(folder: Path, path: Path, drawn: Iterator[tuple[str, str]]) -> str:
    """A row of the table. The set and its tokens are gone afterwards."""
    num_records = write_set(path, drawn)
    config = folder / "config.yaml"
    settings = {
        "run": "large",
        "model": {"name": str(folder / "model")},
        "data": {"train": str(path), "cache_dir": str(folder / "cache")},
        "train": {"epochs": 1, "sequence_length": 2048},
    }
    config.write_text(json.dumps(settings))
    started_s = time.monotonic()
    command = [sys.executable, "-m", "dist_lora", "data", str(config), "--json", "--samples", "0"]
    with tempfile.TemporaryFile("w+") as out:
        # Not subprocess.run: of several children ru_maxrss is the largest one's, and wait4 tells this one's.
        process = subprocess.Popen(command, cwd=ROOT, stdout=out)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, process.returncode
        out.seek(0)
        told = json.loads(out.read())["sets"]["data.train"]
    assert told["samples"]["kept"] == num_records, (told["samples"], num_records)
    size, seconds = path.stat().st_size, time.monotonic() - started_s
    for file in [path, *(folder / "cache").rglob("*")]:
        if file.is_file():
            file.unlink()
    peak = used.ru_maxrss * 1024
    return f"| {size / 1e9:.2f} GB | {num_records:,} | {told['tokens']:,} | {peak / 2**30:.2f} GiB | {seconds:,.0f} s |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=20, help="of the larger set")
    parser.add_argument("--record-bytes", type=int, default=4000)
    parser.add_argument("--text-bytes", type=int, default=100, help="of a record, that are tokenized")
    parser.add_argument("--suffix", choices=(".jsonl", ".json", ".csv", ".parquet"), default=".jsonl")
    parser.add_argument("--dir", type=Path, help="where there is room; default: a temporary folder")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.dir) as name:
        folder = Path(name)
        # In a process of its own: a child's peak begins with the memory of the process that it was forked from.
        subprocess.run(
            [sys.executable, "-c", f"from bench.large_data import *; write_model(Path({str(folder / 'model')!r}))"],
            cwd=ROOT, check=True,
        )  # fmt: skip
        print(
            f"| a set as {chosen.suffix} | records | tokens | peak of `dist-lora data` | time |\n|---|---|---|---|---|"
        )
        for share in (0.01, 1.0):
            drawn = records(int(chosen.gigabytes * share * 1e9), chosen.record_bytes, chosen.text_bytes)
            print(measure(folder, folder / f"data{chosen.suffix}", drawn), flush=True)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\nThis bench itself: {own / 2**20:.0f} MiB.")


if __name__ == "__main__":
    main()
