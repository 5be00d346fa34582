"""Seconds of preparing the standard library, `distlm run jobs/prepare.yaml`: in a cluster that is up, and with one of its own.

    python benchmarks/corpus/prepare.py                # three rounds, the sides in turn
    python benchmarks/corpus/prepare.py --rounds 1     # does it work

The time is that of the command, from the shell's point of view: Python's start, imports, and with a cluster of its own Ray's start and
end too.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPEC = Path(__file__).parents[2] / "jobs" / "prepare.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"a cluster that is up": [], "a cluster of its own": []}
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder:
        for number in range(options.rounds):
            distlm(folder, "cluster", "up")
            try:
                found["a cluster that is up"].append(distlm(folder, "run", str(SPEC), "--set", f"name=up-{number}"))
            finally:
                distlm(folder, "cluster", "down", "--yes")
            found["a cluster of its own"].append(distlm(folder, "run", str(SPEC), "--set", f"name=own-{number}"))
            print(f"round {number + 1}: " + ", ".join(f"{side} {seconds[-1]:.1f} s" for side, seconds in found.items()), file=sys.stderr,
                  flush=True)
    print(f"{'prepare the standard library':28} {'s':>6} {'min':>6} {'max':>6}")
    for side, seconds in found.items():
        print(f"{side:28} {statistics.median(seconds):6.1f} {min(seconds):6.1f} {max(seconds):6.1f}")


def distlm(storage: str, *words: str) -> float:
    """Seconds of a command."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "distlm", *words], check=True, stdout=subprocess.DEVNULL,
                   env={**os.environ, "DISTLM_STORAGE": storage})
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
