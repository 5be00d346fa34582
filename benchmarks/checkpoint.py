"""What a checkpoint costs the steps, not saved, saved while they stand still, and saved beside them, in one run; and how soon a resumed
run makes its first step.

    python benchmarks/checkpoint.py            # 12.2 M parameters, 256 tokens of context, 32 sequences a step, bf16, 2 threads
    python benchmarks/checkpoint.py --quick    # one round, few steps: does it work

Each side is a `distlm run` in a process of its own, in turn. A step's time is that from the end of the one before. A save costs what the
three steps after it take longer than the middle of the steps without saves: the time that they stand still, which metrics.jsonl tells
too, and what the thread that writes takes from them. The default interval is 1,000 steps, in runs of 4,000 or more.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP, AFTER, INTERVAL = 3, 3, 1000
SIDES: dict[str, dict[str, Any]] = {"not saved": {}, "steps wait": {"asynchronous": False}, "beside the steps": {"asynchronous": True}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="times that the sides run in turn")
    parser.add_argument("--saves", type=int, default=4, help="saves of each side in each round")
    parser.add_argument("--every", type=int, default=5, help=f"steps between them, {AFTER + 2} at least")
    parser.add_argument("--preset", default="llama-10m")
    parser.add_argument("--sequences", type=int, default=32, help="sequences of 256 tokens of a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round of two saves")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.saves = 1, 2
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as name:
        root = Path(name)
        prepare(root)
        found: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in SIDES}
        for number, side in itertools.product(range(options.rounds), SIDES):
            run = train(root, f"run-{number}-{list(SIDES).index(side)}", SIDES[side], options)
            found[side].append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
            print(f"round {number + 1}: {side}", file=sys.stderr, flush=True)
        resumed = resume(root, run.name, options)
        size = sum(file.stat().st_size for file in max((run / "checkpoints").glob("step-*")).rglob("*") if file.is_file())
    quiet = statistics.median(itertools.chain(*(intervals(records).values() for records in found["not saved"])))
    print(f"{options.preset}, {options.sequences} x 256 tokens a step, {options.threads} threads; a checkpoint of {size / 1e6:,.0f} MB "
          f"every {options.every} steps, {options.rounds} x {options.saves} of each; medians")
    print(f"a step where nothing is saved: {quiet:.3f} s")
    print(f"{'':18} {'stand still, s':>15} {'to its marker, s':>17} {'steps lose, s':>14} {f'of {options.every} steps':>12} "
          f"{f'of {INTERVAL:,} steps':>15}")
    for side in list(SIDES)[1:]:
        saves = [(record, intervals(records)) for records in found[side] for record in records
                 if record.get("checkpoint", 1) % options.every == 0]
        after = [statistics.median(steps[record["checkpoint"] + i] for record, steps in saves) for i in range(1, AFTER + 1)]
        still, whole = (statistics.median(record[key] for record, _ in saves) for key in ("checkpoint_stall_s", "checkpoint_s"))
        lost = sum(after) - AFTER * quiet
        shares = lost / (options.every * quiet), lost / (INTERVAL * quiet)
        print(f"{side:18} {still:15.3f} {whole:17.3f} {lost:14.3f} {shares[0]:12.2%} {shares[1]:15.3%}")
    print(f"from `distlm run --resume` to the end of its first step: {resumed:.1f} s, Ray's start included")


def prepare(root: Path) -> None:
    """A corpus of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    (root / "text").mkdir()
    for number in range(100):
        (root / "text" / f"{number}.txt").write_text(" ".join(draw.choices(words, weights, k=4000)))
    job(root, {"kind": "prepare", "name": "bench", "sources": [str(root / "text")], "context": 256, "tokenizer": {"vocab_size": 4096}})


def train(root: Path, name: str, saving: dict[str, Any], options: argparse.Namespace) -> Path:
    """The folder of a run. It ends some steps after its last save, so that all have steps after them."""
    steps = options.every * options.saves + AFTER + 1
    every = options.every if saving else steps
    job(root, {"kind": "train", "name": name, "corpus": "bench", "model": {"preset": options.preset}, "precision": "bf16",
               "batch": {"global_sequences": options.sequences, "micro_sequences": options.sequences}, "duration": {"steps": steps},
               "scale": {"threads_per_worker": options.threads}, "evaluate": {"every_steps": steps},
               "checkpoint": {"every_steps": every, **saving}}, options.threads)
    return root / "runs" / name


def resume(root: Path, name: str, options: argparse.Namespace) -> float:
    """Seconds from the command that resumes a run to the end of its first step."""
    steps = options.every * options.saves + AFTER + 1
    began = time.time()
    command(root, ["run", str(root / f"{name}.json"), "--resume", "--set", f"duration.steps={steps + 1}",
                   "--set", f"evaluate.every_steps={steps + 1}"], options.threads)
    records = map(json.loads, (root / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return next(record["time"] for record in records if "loss" in record and record["step"] == steps + 1) - began


def job(root: Path, spec: dict[str, Any], threads: int = 2) -> None:
    file = root / f"{spec['name']}.json"
    file.write_text(json.dumps(spec))                      # which is YAML too
    command(root, ["run", str(file)], threads)


def command(root: Path, arguments: list[str], threads: int) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DISTLM_STORAGE": str(root), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "distlm", *arguments], env=environment, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"distlm {' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def intervals(records: list[dict[str, Any]]) -> dict[int, float]:
    """Step -> seconds from the end of the one before to its own, without the first steps and the last, which evaluates."""
    steps = [record for record in records if "loss" in record]
    return {after["step"]: after["time"] - before["time"] for before, after in itertools.pairwise(steps[WARM_UP - 1:-1])}



if __name__ == "__main__":
    main()
