"""Time per byte and resident memory of a prepare job as its corpus grows: neither should.

    python benchmarks/corpus/scale.py                         # 100, 400 and 1,600 MB, with near-duplicates looked for
    python benchmarks/corpus/scale.py --megabytes 20 80       # does it work

The text is made of words by their rank (Zipf), with a tenth of the documents copied and every fiftieth word of the copies changed. Memory
is the proportional set size of the job and all that it has started, Ray's own processes and object store with them, ten times a second.
"""

import argparse
import contextlib
import itertools
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

RUN = """
import sys, distlm
distlm.run({"kind": "prepare", "name": "scale", "sources": [sys.argv[1]], "workers": int(sys.argv[3]), "dedup": sys.argv[4],
            "filter": {"rules": ["gopher_repetition"]}, "tokenizer": {"vocab_size": 4096, "sample_bytes": 20_000_000}}, storage=sys.argv[2])
"""
DOCUMENT_WORDS = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 400, 1600])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--dedup", choices=["exact", "fuzzy"], default="fuzzy")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="distlm-scale-") as folder:
        for size in options.megabytes:
            source = Path(folder, f"{size}.jsonl")
            write_corpus(source, size * 1_000_000)
            seconds, peak = measure(source, Path(folder, f"store-{size}"), options)
            rows.append((size, seconds, size / seconds / options.workers, peak / 1e9))
            print("{:,} MB: {:.0f} s, {:.2f} MB/s a core, {:.2f} GB at most".format(*rows[-1]), file=sys.stderr, flush=True)
    print(f"{'MB':>8} {'seconds':>9} {'MB/s a core':>12} {'peak GB':>9} {'time per byte':>14}")
    first = rows[0]
    for size, seconds, speed, peak in rows:
        print(f"{size:8,} {seconds:9.1f} {speed:12.2f} {peak:9.2f} {seconds / size / (first[1] / first[0]):14.2f}")
    print("time per byte: over that of the first row")


def write_corpus(path: Path, size: int) -> None:
    """One JSON line per document."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(50_000)]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))
    written, kept = 0, list[list[str]]()
    with open(path, "w") as file:
        while written < size:
            text = draw.choices(words, cum_weights=weights, k=DOCUMENT_WORDS)
            if kept and draw.random() < 0.1:
                text = [draw.choice(words) if i % 50 == 0 else word for i, word in enumerate(draw.choice(kept))]
            elif len(kept) < 1000:
                kept.append(text)
            written += file.write('{"text": "' + " ".join(text) + '"}\n')


def measure(source: Path, storage: Path, options: argparse.Namespace) -> tuple[float, int]:
    """(seconds of the whole job, peak bytes)."""
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-c", RUN, str(source), str(storage), str(options.workers), options.dedup],
                               stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(1):
            peak = max(peak, resident(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    ended.set()
    watcher.join()
    if code:
        sys.exit(f"the job ended with {code}")
    return time.perf_counter() - started, peak


def resident(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.Error):
        for process in [root := psutil.Process(pid), *root.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total


if __name__ == "__main__":
    main()
