"""MB/s of tokenizing in a prepare job, beside a loop of `encode_batch_fast` in one process with one thread, on the same documents.

    python benchmarks/corpus/encode.py                 # 80 MB of Python sources, two workers
    python benchmarks/corpus/encode.py --quick         # 4 MB: does it work

The job's time is that of its stage from the first task to the last, so that starting workers counts; writing the tokens does too. The
loop does nothing with what it gets. A share of 1.00 is as many loops as there are workers, with nothing lost between them.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import tokenizers
from texts import standard_library

import distlm
from distlm.progress import Progress

BATCH_BYTES = 1 << 20


class Times(Progress):
    """When the documents began to be tokenized, and when the last one was."""

    def __init__(self) -> None:
        self.first = self.last = 0.0

    def show(self, record: dict[str, Any]) -> None:
        if record["distlm"] == "update" and record["unit"] == "documents":
            self.first, self.last = self.first or time.perf_counter(), time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=80.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="times that the sides run in turn")
    parser.add_argument("--quick", action="store_true", help="one round on 4 MB")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.rounds = 4.0, 1
    from distlm import cluster

    jobs, loops = list[float](), list[float]()
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder, cluster.connect(Path(folder, "driver.log")):
        texts = list(dict.fromkeys(standard_library(int(options.megabytes * 1e6), packages=True)))    # equal ones would be dropped
        for i, text in enumerate(texts):
            Path(folder, "texts", f"{i // 1000}").mkdir(parents=True, exist_ok=True)
            Path(folder, "texts", f"{i // 1000}", f"{i}.txt").write_text(text, encoding="utf-8")
        for number in range(options.rounds):
            times = Times()
            made = distlm.run({"kind": "prepare", "name": f"encode-{number}", "sources": [f"{folder}/texts"], "workers": options.workers,
                               "clean": {"unicode": "none", "control_characters": "keep"}}, storage=folder, progress=times)
            jobs.append(made["bytes"] / 1e6 / (times.last - times.first))
            loops.append(loop(texts, Path(made[""], "tokenizer", "tokenizer.json")))
            print(f"round {number + 1}: {jobs[-1]:.2f} and {loops[-1]:.2f} MB/s", file=sys.stderr, flush=True)
    print(f"{'':28} {'MB/s':>6} {'min':>6} {'max':>6}")
    for side, speeds in ((f"the job, {options.workers} workers", jobs), ("a loop in one process", loops)):
        print(f"{side:28} {statistics.median(speeds):6.2f} {min(speeds):6.2f} {max(speeds):6.2f}")
    shares = [job / (loop * options.workers) for job, loop in zip(jobs, loops, strict=True)]
    print(f"the job over {options.workers} times the loop: {statistics.median(shares):.2f}")


def loop(texts: list[str], tokenizer_file: Path) -> float:
    """MB/s of a single thread."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    tokenizer.encode_special_tokens = True
    size, batch, waiting = 0, list[str](), 0
    start = time.perf_counter()
    for text in texts:
        batch.append(text)
        waiting += len(text)
        if waiting >= BATCH_BYTES:
            tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            batch, waiting, size = [], 0, size + waiting
    tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    return (size + waiting) / 1e6 / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
