"""MB/s of tokenizing in a prepare job, beside loops of `encode_batch_fast` with one thread, on the same documents: one loop, and as many
at once as the job has workers, which is what the machine can do.

    python benchmarks/corpus/encode.py                 # 80 MB of Python sources, two workers
    python benchmarks/corpus/encode.py --quick         # 4 MB: does it work

The job's time is that of its stage from the first task to the last, so that starting workers counts; writing the tokens does too. A
loop does nothing with what it gets, and at once each loop has all documents.
"""

import argparse
import os
import statistics
import subprocess
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
    parser.add_argument("--loop", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loop:
        print(loop(documents(options.megabytes), options.loop))
        return
    if options.quick:
        options.megabytes, options.rounds = 4.0, 1
    from distlm import cluster

    jobs, loops, together = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder, cluster.connect(Path(folder, "driver.log")):
        texts = documents(options.megabytes)
        for i, text in enumerate(texts):
            Path(folder, "texts", f"{i // 1000}").mkdir(parents=True, exist_ok=True)
            Path(folder, "texts", f"{i // 1000}", f"{i}.txt").write_text(text, encoding="utf-8")
        for number in range(options.rounds):
            times = Times()
            made = distlm.run({"kind": "prepare", "name": f"encode-{number}", "sources": [f"{folder}/texts"], "workers": options.workers,
                               "clean": {"unicode": "none", "control_characters": "keep"}}, storage=folder, progress=times)
            jobs.append(made["bytes"] / 1e6 / (times.last - times.first))
            command = [sys.executable, __file__, "--megabytes", str(options.megabytes), "--loop", f"{made['']}/tokenizer/tokenizer.json"]
            for count, speeds in ((1, loops), (options.workers, together)):
                processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
                speeds.append(sum(float(process.communicate()[0]) for process in processes))
            print(f"round {number + 1}: {jobs[-1]:.2f}, {loops[-1]:.2f} and {together[-1]:.2f} MB/s", file=sys.stderr, flush=True)
    print(f"{'':28} {'MB/s':>6} {'min':>6} {'max':>6}")
    for side, speeds in ((f"the job, {options.workers} workers", jobs), ("a loop in one process", loops),
                         (f"{options.workers} such loops at once", together)):
        print(f"{side:28} {statistics.median(speeds):6.2f} {min(speeds):6.2f} {max(speeds):6.2f}")
    shares = [[job / other for job, other in zip(jobs, others, strict=True)] for others in (loops, together)]
    print(f"the job over {options.workers} times the loop: {statistics.median(shares[0]) / options.workers:.2f}; "
          f"over {options.workers} loops at once: {statistics.median(shares[1]):.2f}")


def documents(megabytes: float) -> list[str]:
    """Without equal ones, which the job would drop."""
    return list(dict.fromkeys(standard_library(int(megabytes * 1e6), packages=True)))


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
