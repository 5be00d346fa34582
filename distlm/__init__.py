"""distlm: from raw text to a served language model, with one YAML spec per job, on Ray and DeepSpeed.

    outputs = distlm.run("jobs/train.yaml", overrides=["seed=1"])
    submission = distlm.submit("jobs/train.yaml")              # the same as a Ray job
    print(distlm.load_run("py-10m").read_metrics()[-1], distlm.status("py-10m").state)
    print("".join(distlm.query("py", "def add(")))
    distlm.stop("py")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distlm.execute import resolve, run
    from distlm.jobs import load_run, query, stop, submit
    from distlm.jobs import locate as status

__version__ = "0.1.0"
__all__ = ["__version__", "load_run", "query", "resolve", "run", "status", "stop", "submit"]

_HOMES = {"resolve": ("distlm.execute", "resolve"), "run": ("distlm.execute", "run"), "load_run": ("distlm.jobs", "load_run"),
          "query": ("distlm.jobs", "query"), "status": ("distlm.jobs", "locate"), "stop": ("distlm.jobs", "stop"),
          "submit": ("distlm.jobs", "submit")}


def __getattr__(name: str) -> Any:
    """Import what is asked for, when it is: Ray and torch are slow to load."""
    if name in _HOMES:
        from importlib import import_module

        module, attribute = _HOMES[name]
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
