"""How soon a run ends its first step, new and resumed, and what its processes have taken of a core until then.

    python benchmarks/start.py                    # 12.2 M parameters, 4,096 tokens a step, bf16, 2 threads, three rounds
    python benchmarks/start.py --beside FOLDER    # in turn with the distlm of another checkout
    python benchmarks/start.py --quick            # a tiny model, one round: does it work

Each `distlm run` brings up a Ray of its own. After its first step it is sent SIGTERM, saves, and goes on by `--resume`. What a process
has taken is read when the first step has ended, that of processes which had ended by then from those that had started them.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
from checkpoint import prepare

LONGEST_S = 300
TINY = {"config": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}}
AT = {"starting": "to the job, Ray started", "running": "to its workers"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="times that each side starts and resumes")
    parser.add_argument("--workers", type=int, default=1, help="of two threads between them")
    parser.add_argument("--beside", type=Path, metavar="FOLDER", help="another checkout of distlm")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    sides = {"this checkout": Path(__file__).resolve().parents[1], **({"beside": options.beside.resolve()} if options.beside else {})}
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as name:
        root = Path(name)
        prepare(root)
        for number in range(rounds):
            for side, code in sides.items():
                run = f"run-{number}-{side.split()[0]}"
                spec = {"kind": "train", "name": run, "corpus": "bench", "model": TINY if options.quick else {"preset": "llama-10m"},
                        "precision": "bf16", "batch": {"global_sequences": 16, "micro_sequences": 16 // options.workers},
                        "scale": {"workers": options.workers, "threads_per_worker": max(1, 2 // options.workers)},
                        "duration": {"steps": 1000}}
                (root / f"{run}.json").write_text(json.dumps(spec))
                for what in ("new", "resumed"):
                    found.setdefault((what, side), []).append(start(root, run, code, resume=what == "resumed"))
                print(f"round {number + 1}: {side}", file=sys.stderr, flush=True)
    print(f"seconds from the command, medians of {rounds}, {options.workers} workers")
    print(f"{'':26} " + " ".join(f"{what:>24}" for what in (*AT.values(), "to its first step", "of a core", "processes then")))
    for (what, side), starts in sorted(found.items()):
        print(f"{what + ', ' + side:26} " + " ".join(f"{statistics.median(one[key] for one in starts):24.1f}" for key in (
            *AT, "first step", "cpu_s", "processes")))
    last = found["new", "this checkout"][-1]
    print("seconds of a core by kind of process, the last new run: " + ", ".join(
        f"{kind} {seconds:.1f}" for kind, seconds in last["by_kind"].most_common()))


def start(root: Path, run: str, code: Path, *, resume: bool) -> dict[str, Any]:
    folder = root / "runs" / run
    known = len(lines(folder / "metrics.jsonl"))
    environment = {**os.environ, "DISTLM_STORAGE": str(root), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(code), "OMP_NUM_THREADS": "2"}
    began = time.time()
    process = subprocess.Popen([sys.executable, "-m", "distlm", "run", str(root / f"{run}.json"), *(["--resume"] * resume)], cwd=root,
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (steps := [record for record in lines(folder / "metrics.jsonl")[known:] if "loss" in record]):
        if process.poll() is not None or time.time() > began + LONGEST_S:
            process.send_signal(signal.SIGINT)
            sys.exit(f"{run} makes no step:\n{process.communicate()[0][-3000:]}")
        time.sleep(0.05)
    driver = psutil.Process(process.pid)
    taken = by_kind([driver, *driver.children(recursive=True)])
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[0]
    if not any((folder / "checkpoints").glob("step-*/COMMITTED")):
        sys.exit(f"{run} has not saved at SIGTERM, so that nothing would be resumed:\n{said[-3000:]}")
    events = [event for event in lines(folder / "events.jsonl") if event["time"] > began and event["state"] in AT]
    return {**{event["state"]: event["time"] - began for event in events}, "first step": steps[0]["time"] - began,
            "cpu_s": sum(taken.values()), "processes": taken.total_processes, "by_kind": taken}


class Taken(Counter[str]):
    """Kind of process -> seconds of a core."""

    total_processes = 0


def by_kind(processes: Iterable[psutil.Process]) -> Taken:
    taken = Taken()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            words, times = process.cmdline(), process.cpu_times()
            name = next((word for word in words if word.startswith("ray::")), Path(words[0]).name if words else process.name())
            script = next((Path(word).stem for word in words[1:] if word.endswith(".py")), "")
            kind = re.sub(r"^ray::|\..*$", "", name) if name.startswith("ray::") else script or name
            taken[kind] += times.user + times.system
            taken["ended meanwhile"] += times.children_user + times.children_system
            taken.total_processes += 1
    return taken


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")] if file.exists() else []


if __name__ == "__main__":
    main()
