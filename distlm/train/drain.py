"""Ray's notice that a node will be drained, as an autoscaler gives it before a spot machine goes: the driver looks for it, and has the
ranks save and end where one of them is on that node.

    with drains_passed_on(folder, progress):
        ...                                                # a group of workers, whose nodes `write_nodes` has told

Ray schedules nothing on such a node, so that the group which goes on is elsewhere; what else of the run is there, such as a task of the
stream, Ray makes again.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.storage import read_json, write_json
from distlm.train import preempt

NODES = "nodes.json"
"""The file in a run's folder with the ids of the nodes of its ranks, in their order."""
LOOK_S = 2.0
"""Seconds between looks."""


def node_id() -> str:
    """Ray's name of the node of this process."""
    import ray

    return ray.get_runtime_context().get_node_id()


def write_nodes(run: Path, nodes: list[str]) -> None:
    """Tell on which node each rank of the group is that begins now."""
    write_json(run / NODES, nodes)


@contextlib.contextmanager
def drains_passed_on(folder: RunFolder, progress: Progress) -> Iterator[None]:
    """Let the ranks of one group know, once, that a node of theirs will be drained, by preempt.DRAIN. A cluster that does not tell which
    nodes are drained is noted once, and asked again."""
    nodes, flag, stop = folder.path / NODES, folder.path / preempt.DRAIN, threading.Event()
    nodes.unlink(missing_ok=True)                          # those of a driver that was killed
    flag.unlink(missing_ok=True)

    def watch() -> None:
        said = False
        while not stop.wait(LOOK_S):
            try:
                draining = draining_nodes()
                ranks = read_json(nodes) if draining and nodes.exists() else []
                if found := {node: draining[node] for node in ranks if node in draining}:
                    _pass_on(folder, progress, found, ranks)
                    return
            except Exception as error:                     # a call that is not public, and no run is to end by it
                if not said:
                    progress.note(text := f"whether Ray drains a node is not known: {type(error).__name__}: {error}"[:300])
                    folder.event("note", message=text)
                said = True

    thread = threading.Thread(target=watch, daemon=True, name="drains")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
        nodes.unlink(missing_ok=True)
        flag.unlink(missing_ok=True)


def draining_nodes() -> dict[str, int]:
    """Id -> when it ends, in milliseconds since the epoch, 0 where that is not said: what Ray Train's own watcher looks at."""
    import ray

    return dict(ray._private.state.state.get_draining_nodes())


def _pass_on(folder: RunFolder, progress: Progress, found: dict[str, int], ranks: list[str]) -> None:
    """`found` are the nodes of `ranks` that are drained, and when they end."""
    import ray

    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    now, names = time.time(), " and ".join(addresses.get(node, node) for node in found)
    left_s = min((max(0.0, end / 1e3 - now) for end in found.values() if end), default=None)
    what = f"Ray drains the node{'s' * (len(found) > 1)} {names}"
    write_json(folder.path / preempt.DRAIN, {"what": what, "time": now, "left_s": left_s})
    left = "without a deadline" if left_s is None else f"with {left_s:.4g} s left"
    which = ", ".join(str(rank) for rank, node in enumerate(ranks) if node in found)
    progress.note(text := f"{what}, {left}: rank {which} is there, and all save after their step")
    folder.event("note", message=text, nodes=[*found], left_s=left_s)
