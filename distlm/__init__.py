"""distlm: from raw text to a served language model, with one YAML spec per job, on Ray and DeepSpeed.

    outputs = distlm.run("jobs/train.yaml", overrides=["seed=1"])
    submission = distlm.submit("jobs/train.yaml")              # the same as a Ray job
    print(distlm.load_run("py-10m").read_metrics()[-1], distlm.status("py-10m").state)
    print("".join(distlm.query("py", "def add(")))
    distlm.stop("py")

Every verb of the command line is here; the names below are the functions that it calls, and differ from those of modules.
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distlm.attribution import explain
    from distlm.cluster import require as find_cluster
    from distlm.cluster import status as cluster_status
    from distlm.clusterfile import read as read_cluster_file
    from distlm.corpus.diff import diff as corpus_diff
    from distlm.corpus.inspect import documents as corpus_documents
    from distlm.corpus.inspect import find as corpus_find
    from distlm.corpus.inspect import summary as corpus_summary
    from distlm.corpus.inspect import windows as corpus_windows
    from distlm.corpus.verify import verify as corpus_verify
    from distlm.dashboard import serve as tensorboard
    from distlm.endpoints import classify, query
    from distlm.execute import profile, resolve, run
    from distlm.head import LocalCluster
    from distlm.head import down as cluster_down
    from distlm.head import recorded as local_clusters
    from distlm.head import up as cluster_up
    from distlm.init import init as write_starters
    from distlm.jobs import jobs as list_jobs
    from distlm.jobs import load_run
    from distlm.jobs import locate as status
    from distlm.logs import driver_log, follow
    from distlm.plan import needs
    from distlm.stopping import stop
    from distlm.storage import Storage
    from distlm.submitting import submit
    from distlm.train.recipe import find_corpus

__version__ = "0.1.0"
_HOMES = {
    "LocalCluster": "head:LocalCluster", "Storage": "storage:Storage", "classify": "endpoints:classify", "cluster_down": "head:down",
    "cluster_status": "cluster:status", "cluster_up": "head:up", "corpus_diff": "corpus.diff:diff",
    "corpus_documents": "corpus.inspect:documents", "corpus_find": "corpus.inspect:find", "corpus_summary": "corpus.inspect:summary",
    "corpus_verify": "corpus.verify:verify", "corpus_windows": "corpus.inspect:windows", "driver_log": "logs:driver_log",
    "explain": "attribution:explain", "find_cluster": "cluster:require", "find_corpus": "train.recipe:find_corpus", "follow": "logs:follow",
    "list_jobs": "jobs:jobs", "load_run": "jobs:load_run", "local_clusters": "head:recorded", "needs": "plan:needs",
    "profile": "execute:profile", "query": "endpoints:query", "read_cluster_file": "clusterfile:read", "resolve": "execute:resolve",
    "run": "execute:run", "status": "jobs:locate", "stop": "stopping:stop", "submit": "submitting:submit", "tensorboard": "dashboard:serve",
    "write_starters": "init:init"}
"""Name here -> module and name there."""
__all__ = [
    "LocalCluster", "Storage", "__version__", "classify", "cluster_down", "cluster_status", "cluster_up", "corpus_diff", "corpus_documents",
    "corpus_find", "corpus_summary", "corpus_verify", "corpus_windows", "driver_log", "explain", "find_cluster", "find_corpus", "follow",
    "list_jobs", "load_run", "local_clusters", "needs", "profile",
    "query", "read_cluster_file", "resolve", "run", "status", "stop", "submit", "tensorboard",
    "write_starters"]


for _noisy in ("torchao", "torch.utils._pytree"):          # transformers loads torchao where it is installed, which then tells of what the
    logging.getLogger(_noisy).setLevel(logging.ERROR)      # machine does not run

if not TYPE_CHECKING:                                      # for a type checker every name would be one that it finds

    def __getattr__(name: str) -> Any:
        """Import what is asked for, when it is: Ray and torch are slow to load."""
        if name in _HOMES:
            from importlib import import_module

            module, attribute = _HOMES[name].split(":")
            return getattr(import_module(f"distlm.{module}"), attribute)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
