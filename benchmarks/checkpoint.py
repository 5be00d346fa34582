"""What a checkpoint costs the steps, not saved, saved while they stand still, and saved beside them, in one run; and how soon a resumed
run makes its first step.

    python benchmarks/checkpoint.py            # 12.2 M parameters, 256 tokens of context, 32 sequences a step, bf16, 2 threads
    python benchmarks/checkpoint.py --quick    # one round, few steps: does it work

Each side is a `distlm run` in a process of its own, in turn. A step's time is that from the end of the one before. metrics.jsonl tells
how long steps stand still for a save; what they lose is how much longer the three steps after it take, together, than other steps of the
same run, which is noise where nothing is saved: the thread that writes takes its share of the processor too. The default interval is
1,000 steps, in runs of 4,000 or more.
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
    print(f"{options.preset}, {options.sequences} x 256 tokens a step, {options.threads} threads; a checkpoint of {size / 1e6:,.0f} MB "
          f"every {options.every} steps, {options.rounds} x {options.saves} of each; medians")
    print(f"{'':18} {'step, s':>9} {'steps lose, s':>14} {'stand still, s':>15} {f'of {options.every} steps':>12} "
          f"{f'of {INTERVAL:,} steps':>15} {'to its marker, s':>17}")
    for side, runs in found.items():
        saves = [record for records in runs for record in records if record.get("checkpoint", 1) % options.every == 0]
        step = statistics.median(seconds for records in runs for seconds in quiet(records, options.every).values())
        row = f"{side:18} {step:9.3f} {statistics.median(one for records in runs for one in lost(records, options.every)):14.3f}"
        if saves:
            still, whole = (statistics.median(record[key] for record in saves) for key in ("checkpoint_stall_s", "checkpoint_s"))
            row += f" {still:15.3f} {still / (options.every * step):12.2%} {still / (INTERVAL * step):15.4%} {whole:17.3f}"
        print(row)
    print("from `distlm run --resume`, seconds: " + ", ".join(f"{what} {seconds:.1f}" for what, seconds in resumed.items()))


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


def resume(root: Path, name: str, options: argparse.Namespace) -> dict[str, float]:
    """Seconds from the command that resumes a run to what comes until the end of its first step."""
    steps, run = options.every * options.saves + AFTER + 1, root / "runs" / name
    began = time.time()
    command(root, ["run", str(root / f"{name}.json"), "--resume", "--set", f"duration.steps={steps + 1}",
                   "--set", f"evaluate.every_steps={steps + 1}"], options.threads)
    records, events = ([json.loads(line) for line in (run / file).read_text().splitlines()] for file in ("metrics.jsonl", "events.jsonl"))
    at = {event["state"]: event["time"] for event in events if event["state"] in ("starting", "running")}
    at = {"to the job, Ray started": at["starting"], "to its workers": at["running"],
          "to the end of its first step": next(record["time"] for record in records if "loss" in record and record["step"] == steps + 1)}
    return {what: when - began for what, when in at.items()}


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


def quiet(records: list[dict[str, Any]], every: int) -> dict[int, float]:
    """The intervals of steps that come after no save."""
    return {step: seconds for step, seconds in intervals(records).items() if step < every or step % every not in range(1, AFTER + 1)}


def lost(records: list[dict[str, Any]], every: int) -> list[float]:
    """At each step that saves, or would, how much longer the steps after it took."""
    steps, usual = intervals(records), statistics.median(quiet(records, every).values())
    return [sum(steps[at + i] - usual for i in range(1, AFTER + 1)) for at in range(every, max(steps) - AFTER + 1, every)]


if __name__ == "__main__":
    main()
