"""Whether a cluster holds what a job needs; in one that grows, a job that is too large waits for the nodes that an autoscaler adds.

    require(train_bundles(spec), "4 workers and the data stream", progress, where="scale", remedy="...")      # Ray is initialised
"""

import json
import time
from bisect import bisect_left
from collections import Counter

from distlm.errors import ClusterError
from distlm.progress import Progress
from distlm.spec import CompressSpec, EvaluateSpec, ServeSpec, TrainSpec

GROW_S = 900
"""So long nodes are waited for."""

REPORT_S = 15
"""So long the first report of Ray's monitor is waited for; it comes every 5 s."""

Bundles = list[dict[str, float]]
"""What a job needs: of each resource so much together on a node, for each of its processes."""

DATA_CPUS = 1
"""Logical CPUs that the data stream of a training needs beside the workers."""


def train_bundles(spec: TrainSpec) -> Bundles:
    """The workers, the one that evaluates beside them, and the data stream."""
    beside = spec.evaluate.worker
    return [*[{"CPU": spec.scale.cpus_per_worker, "GPU": spec.scale.gpus_per_worker}] * spec.scale.workers,
            *([{"CPU": beside.cpus, "GPU": beside.gpus}] if beside else []), {"CPU": DATA_CPUS}]


def evaluate_bundles(spec: EvaluateSpec) -> Bundles:
    """The workers; an endpoint is asked by the job itself."""
    return [{"CPU": spec.cpus_per_worker, "GPU": spec.gpus_per_worker}] * (spec.workers if spec.model is not None else 0)


def compress_bundles(spec: CompressSpec) -> Bundles:
    """The one worker."""
    return [{"CPU": spec.cpus, "GPU": spec.gpus}]


def serve_bundles(spec: ServeSpec) -> Bundles:
    """The replicas."""
    return [{"CPU": spec.cpus_per_replica, "GPU": spec.gpus_per_replica}] * spec.replicas


def require(bundles: Bundles, what: str, progress: Progress, *, where: str, remedy: str) -> None:
    """Raises ClusterError where the cluster cannot hold these and does not grow to them: Ray would wait for ever."""
    import ray

    grow(bundles, progress)
    if fits(bundles):
        return
    have = ray.cluster_resources()
    for name, amount in total(bundles).items():
        if amount > have.get(name, 0):
            raise ClusterError(f"{what} need{'s' * (len(bundles) == 1)} {amount:g} {name}s, and the cluster has {have.get(name, 0):g}",
                               where=where, cause="bad_spec", remedy=remedy)
    parts = Counter(f"{bundle.get('CPU', 0):g} CPUs and {bundle.get('GPU', 0):g} GPUs" for bundle in bundles)
    raise ClusterError(f"{what}, {', '.join(f'{number} of {part}' for part, number in parts.items())}, do not fit the cluster's nodes one "
                       "by one", where=where, cause="bad_spec", remedy=remedy)


def total(bundles: Bundles) -> dict[str, float]:
    """CPUs and GPUs together."""
    return {name: round(sum(bundle.get(name, 0) for bundle in bundles), 4) for name in ("CPU", "GPU")}


def times(bundles: Bundles, most: int) -> int:
    """How often the cluster holds these at once, `most` at most."""
    return bisect_left(range(1, most + 1), True, key=lambda number: not fits(bundles * number))


def grow(bundles: Bundles, progress: Progress, timeout_s: float = GROW_S) -> None:
    """Where the cluster has less than these together, each on a node, and an autoscaler, wait until they fit. It returns where they never
    can, or have not in time: what is there then is for the caller to judge."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    need = total(bundles)
    if fits(bundles) or not autoscales():
        return
    most = largest()
    if most is not None and any(amount > most.get(name, 0) for name, amount in need.items()):
        return
    short = {name: amount for name, amount in need.items() if amount > ray.cluster_resources().get(name, 0)} or need
    said = ", ".join(f"{amount:g} {name}s" for name, amount in short.items())
    progress.note(f"the job needs {said} and the cluster has {_has(short)}: waiting for its autoscaler to add nodes, at most "
                  f"{timeout_s / 60:.0f} minutes")
    asked = placement_group([{name: amount for name, amount in bundle.items() if amount} for bundle in bundles])
    deadline = time.monotonic() + timeout_s
    try:
        while not asked.wait(1) and time.monotonic() < deadline:
            for name, amount in short.items():
                progress.update(f"{name}s there", int(ray.cluster_resources().get(name, 0)), int(amount))
    finally:
        remove_placement_group(asked)


def fits(bundles: Bundles) -> bool:
    """Whether the cluster as it is holds these together, each on a node, when nothing else runs: the largest ones are placed first, each on
    the first node that has room."""
    import ray

    rooms = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    for bundle in sorted(bundles, key=lambda one: (one.get("GPU", 0), one.get("CPU", 0)), reverse=True):
        room = next((room for room in rooms if all(room.get(name, 0) >= amount for name, amount in bundle.items() if amount)), None)
        if room is None:
            return False
        for name, amount in bundle.items():
            if amount:
                room[name] = round(room[name] - amount, 4)   # Ray counts in ten-thousandths
    return True


def _has(names: dict[str, float]) -> str:
    import ray

    have = ray.cluster_resources()
    return ", ".join(f"{have.get(name, 0):g}" for name in names)


def autoscales(timeout_s: float = REPORT_S) -> bool:
    """Whether something adds nodes to the cluster. A monitor that only looks on names a node's type after the node; that of a cluster that
    has just begun has not said anything yet, and is waited for."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.experimental.internal_kv import _internal_kv_get

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    if any(node.ray_node_type_name not in ("", f"node_{node.node_id}") for node in (*status.active_nodes, *status.idle_nodes)):
        return True
    deadline, report = time.monotonic() + timeout_s, None
    while not report and time.monotonic() < deadline:
        report = json.loads(_internal_kv_get("__autoscaling_status") or "{}").get("autoscaler_report")
        if not report:
            time.sleep(0.2)
    return any(kind != f"node_{node}" for node, kind in (report or {}).get("node_type_mapping", {}).items())


def largest() -> dict[str, float] | None:
    """What the cluster can grow to, where whoever runs it has told Ray; open-source autoscalers do not."""
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config()
    return None if most is None else dict(most)
