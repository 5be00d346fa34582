"""Where a step goes: ten steps of a run under PyTorch's profiler, after three that are not looked at.

    profile = StepProfile(folder / "profile", rank=0, on_gpu=False)
    ...                                                    # a step, its parts inside `region`s
    profile.step()                                         # the last one writes trace.json and profile.json
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distlm.storage import write_json, writing

if TYPE_CHECKING:
    from torch.autograd.profiler import record_function

WARM_UP, STEPS = 3, 10
REGIONS = ("data", "forward", "backward", "optimizer")
TOP = 12


def region(name: str) -> "record_function":
    """A part of a step, for the block: costs microseconds where no profiler runs."""
    import torch

    return torch.autograd.profiler.record_function(f"distlm.{name}")


class StepProfile:
    """Follows the steps of one rank; rank 0 writes what it has seen."""

    def __init__(self, folder: Path, rank: int, on_gpu: bool) -> None:
        from torch.profiler import ProfilerActivity, profile, schedule

        self._folder, self._rank, self._on_gpu, self._done, self._started = folder, rank, on_gpu, 0, 0.0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        self._profiler = profile(activities=activities, schedule=schedule(wait=WARM_UP - 1, warmup=1, active=STEPS, repeat=1))
        self._profiler.start()

    def step(self) -> None:
        """One more step is done. After the last the profiler has stopped."""
        self._done += 1
        if self._done == WARM_UP + STEPS:
            self._wait()
            seconds = time.perf_counter() - self._started
            self._profiler.stop()
            if self._rank == 0:
                self._write(seconds)
            return
        self._profiler.step()
        if self._done == WARM_UP:
            self._wait()
            self._started = time.perf_counter()

    def _wait(self) -> None:
        import torch

        if self._on_gpu:
            torch.cuda.synchronize()

    def _write(self, seconds: float) -> None:
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._folder / "trace.json"))
        write_json(self._folder / "profile.json", summary(self._profiler.key_averages(), seconds, self._on_gpu))


def summary(events: Any, seconds: float, on_gpu: bool) -> dict[str, Any]:
    """Milliseconds of a step, of its regions, and of the operators that take the most, each without those that it calls.

    `seconds`: of all STEPS by the clock. On a GPU a region's time is that of its kernels, or of the processor where it starts none; what is
    no region's is `other`."""
    regions = dict.fromkeys(REGIONS, 0.0)
    operators = []
    for event in events:
        name = event.key.removeprefix("distlm.")
        if event.key.startswith("distlm.") and name in regions:
            regions[name] = max(regions[name], (on_gpu and event.device_time_total) or event.cpu_time_total)
        elif not event.key.startswith("ProfilerStep"):
            operators.append((event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.key, event.count))
    each = {name: microseconds / 1e3 / STEPS for name, microseconds in regions.items()}
    step = seconds * 1e3 / STEPS
    each["other"] = max(0.0, step - sum(each.values()))
    operators.sort(reverse=True)
    return {"steps": STEPS, "step_ms": step, "regions_ms": each, "operators": [
        {"name": name, "ms": microseconds / 1e3 / STEPS, "calls": count / STEPS} for microseconds, name, count in operators[:TOP]]}


def rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, milliseconds a step, share, calls a step) of a summary."""
    def row(name: str, ms: float, calls: str = "") -> tuple[str, str, str, str]:
        return name[:60], f"{ms:.2f}", f"{ms / found['step_ms']:.1%}", calls

    return [row("step", found["step_ms"]), *(row(name, ms) for name, ms in found["regions_ms"].items()),
            *(row(f"  {one['name']}", one["ms"], f"{one['calls']:g}") for one in found["operators"])]
