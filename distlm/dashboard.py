"""TensorBoard over the metrics of one job, a sweep's trials side by side, or everything under the storage root.

    with serve([storage.run("py-10m")]) as url: ...
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from distlm.errors import ClusterError, InputError
from distlm.head import free_ports
from distlm.storage import FOLDERS, Storage


def folders(paths: Sequence[Path]) -> dict[str, Path]:
    """Label -> folder with TensorBoard's event files, for every run at or below `paths`. Raises InputError where there are none."""
    found: dict[str, Path] = {}
    for path in paths:
        for events in sorted(path.rglob("events.out.tfevents.*")):
            run = events.parent
            inside = [part for part in run.relative_to(path.parent).parts if part not in ("tensorboard", "trials")]
            found.setdefault("/".join(inside) or path.name, run)
    if not found:
        raise InputError("no metrics have been written there yet", where=", ".join(map(str, paths)),
                         remedy="a training run writes them from its first step on")
    return found


def all_of(storage: Storage) -> list[Path]:
    """Every run and sweep under the storage root."""
    return [path for kind in ("train", "tune") for path in sorted((storage.root / FOLDERS[kind]).glob("*")) if path.is_dir()]


@contextlib.contextmanager
def serve(paths: Sequence[Path], port: int | None = None) -> Iterator[str]:
    """TensorBoard on loopback for the time of the block; yields its address."""
    shown = folders(paths)
    from tensorboard import program

    for name in ("tensorboard", "werkzeug"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="distlm-tensorboard-") as view:
        for label, folder in shown.items():                # links give the runs short names, whatever lies around them
            link = Path(view) / label
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder.absolute(), target_is_directory=True)
        board = program.TensorBoard()
        board.configure(argv=["distlm", f"--logdir={view}", "--host=127.0.0.1", f"--port={port or free_ports(1)[0]}", "--reload_interval=5",
                              "--load_fast=false"])
        try:
            yield board.launch()
        except (program.TensorBoardServerException, program.TensorBoardPortInUseError) as error:
            raise ClusterError(f"TensorBoard does not start: {error}", remedy="another --port, or none for a free one") from None
