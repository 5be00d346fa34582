"""A run's metrics in MLflow and Weights & Biases, beside metrics.jsonl, which stays the truth.

    with tracked(spec, folder, progress) as log:
        log({"step": 1, "loss": 4.2, "time": 1e9})
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import httpx

from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec.load import dotted, dump, leaves
from distlm.spec.train import TrainSpec
from distlm.storage import read_json, write_json
from distlm.train.metrics import by_source

FILE = "track.json"
"""The ids of the run where it is followed: a run that goes on goes on there."""
BATCH, RETRY_S, LAST_S = 200, 2.0, 15.0
"""Records that are sent together; seconds between tries, and those for the rest at the end."""
STATUS = {"succeeded": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class Sink(Protocol):
    """One service. Raises OSError or httpx.HTTPError where it does not answer."""

    def send(self, records: list[dict[str, Any]]) -> None: ...
    def close(self, state: str) -> None: ...


@contextlib.contextmanager
def tracked(spec: TrainSpec, folder: RunFolder, progress: Progress) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that takes records of metrics.jsonl and returns at once. Services that do not answer are tried again, and told of at the
    end where something could not be sent: they never end a run."""
    senders = [Sender(name, make, folder, progress) for name, make in sinks(spec, folder)]

    def log(record: dict[str, Any]) -> None:
        for sender in senders:
            sender.put(record)

    state = "failed"
    try:
        yield log
        state = "succeeded"
    except KeyboardInterrupt:
        state = "stopped"
        raise
    finally:
        for sender in senders:
            sender.finish(state)


def sinks(spec: TrainSpec, folder: RunFolder) -> Iterator[tuple[str, Callable[[], Sink]]]:
    if spec.track.mlflow:
        yield "mlflow", lambda: Mlflow(str(spec.track.mlflow), spec, folder)
    if spec.track.wandb:
        yield "wandb", lambda: Wandb(str(spec.track.wandb), spec, folder)


class Sender:
    """A thread that passes records on, in their order, as soon as the service takes them."""

    def __init__(self, name: str, make: Callable[[], Sink], folder: RunFolder, progress: Progress) -> None:
        self._name, self._make, self._folder, self._progress = name, make, folder, progress
        self._records: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._state, self._ended = "failed", threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"track-{name}")
        self._thread.start()

    def put(self, record: dict[str, Any]) -> None:
        self._records.put(record)

    def finish(self, state: str) -> None:
        self._state = state
        self._ended.set()
        self._records.put(None)
        self._thread.join(timeout=2 * LAST_S)

    def _work(self) -> None:
        sink: Sink | None = None
        left: list[dict[str, Any]] = []
        until = None
        while True:
            left += self._taken(wait=not left)
            if self._ended.is_set() and until is None:
                until = time.monotonic() + LAST_S
            try:
                sink = sink or self._make()
                while left:
                    sink.send(left[:BATCH])
                    left = left[BATCH:]
                if until is not None:
                    sink.close(self._state)
                    return
            except (OSError, httpx.HTTPError) as error:
                if until is not None and time.monotonic() + RETRY_S > until:
                    return self._tell(error)
                self._ended.wait(RETRY_S) if until is None else time.sleep(RETRY_S)

    def _taken(self, wait: bool) -> list[dict[str, Any]]:
        """What has come since, without the end's mark."""
        found = [self._records.get()] if wait and not self._ended.is_set() else []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._records.get_nowait())
        return [record for record in found if record is not None]

    def _tell(self, error: Exception) -> None:
        text = f"{self._name} has not taken all metrics: {error or type(error).__name__}; metrics.jsonl has them"
        self._progress.note(text)
        self._folder.event("note", message=text)


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The metrics of a record."""
    return {key: float(value) for key, value in {**record, **by_source(record)}.items()
            if key not in ("step", "time") and isinstance(value, int | float)}


def settings(spec: TrainSpec) -> dict[str, str]:
    """The values of a spec by their key paths, as text."""
    return {dotted(path): str(value) for path, value in leaves(dump(spec))}


class Mlflow:
    """MLflow's REST API, 2.0; a name and a password, or a token, from the variables that its own client reads."""

    def __init__(self, uri: str, spec: TrainSpec, folder: RunFolder) -> None:
        env = os.environ.get
        user = env("MLFLOW_TRACKING_USERNAME")
        token = {"Authorization": f"Bearer {env('MLFLOW_TRACKING_TOKEN')}"} if env("MLFLOW_TRACKING_TOKEN") else {}
        self._http = httpx.Client(base_url=uri.rstrip("/") + "/api/2.0/mlflow/", headers=token, timeout=10,
                                  auth=(user, env("MLFLOW_TRACKING_PASSWORD", "")) if user else None)
        place = folder.path / FILE
        known = read_json(place) if place.exists() else {}
        if "mlflow" in known:
            self._run = known["mlflow"]
            self._post("runs/update", run_id=self._run, status="RUNNING")
            return
        found = self._http.get("experiments/get-by-name", params={"experiment_name": env("MLFLOW_EXPERIMENT_NAME", "distlm")})
        if found.status_code == 404:
            experiment = self._post("experiments/create", name=env("MLFLOW_EXPERIMENT_NAME", "distlm"))["experiment_id"]
        else:
            experiment = found.raise_for_status().json()["experiment"]["experiment_id"]
        self._run = self._post("runs/create", experiment_id=experiment, run_name=folder.name, start_time=round(time.time() * 1e3),
                               tags=[{"key": "distlm.folder", "value": str(folder.path)}])["run"]["info"]["run_id"]
        values = [{"key": key, "value": value[:500]} for key, value in settings(spec).items()]
        for start in range(0, len(values), 100):
            self._post("runs/log-batch", run_id=self._run, params=values[start:start + 100])
        write_json(place, {**known, "mlflow": self._run})

    def send(self, records: list[dict[str, Any]]) -> None:
        metrics = [{"key": key, "value": value, "timestamp": round(record["time"] * 1e3), "step": record["step"]}
                   for record in records for key, value in numbers(record).items()]
        for start in range(0, len(metrics), 1000):         # the most that it takes at once
            self._post("runs/log-batch", run_id=self._run, metrics=metrics[start:start + 1000])

    def close(self, state: str) -> None:
        self._post("runs/update", run_id=self._run, status=STATUS[state], end_time=round(time.time() * 1e3))
        self._http.close()

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._http.post(path, json=body).raise_for_status().json()
        return answer


class Wandb:
    """W&B's own client, the extra `wandb`: its variables hold, WANDB_MODE=offline too, whose files lie in the run's folder."""

    def __init__(self, project: str, spec: TrainSpec, folder: RunFolder) -> None:
        import wandb

        place = folder.path / FILE
        known = read_json(place) if place.exists() else {}
        try:
            self._run = wandb.init(project=project, name=folder.name, id=known.get("wandb"), resume="allow", dir=str(folder.path),
                                   config=settings(spec), settings=wandb.Settings(silent=True))
        except wandb.errors.Error as error:
            raise OSError(str(error)) from None
        write_json(place, {**known, "wandb": self._run.id})
        self._last = self._run.step

    def send(self, records: list[dict[str, Any]]) -> None:
        for record in records:                             # steps only go up there: what comes late stands at the last, and names its own
            late = {"evaluated_step": record["step"]} if record["step"] < self._last else {}
            self._last = max(self._last, record["step"])
            self._run.log({**numbers(record), **late}, step=self._last)

    def close(self, state: str) -> None:
        self._run.finish(exit_code=int(state != "succeeded"))
