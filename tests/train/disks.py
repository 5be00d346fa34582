"""Disks for ranks where libaio is not installed: a stand-in for it, with which DeepSpeed's op is built, or one for the op itself, which
needs no compiler."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from deepspeed.ops.op_builder import AsyncIOBuilder

AIO = Path(__file__).with_name("aio")


def lacking() -> str:
    """What the op cannot be built without, where it is not here; empty else."""
    return next((name for name in ("cc", "c++", "ar", "ninja") if not shutil.which(name)), "")


def build_op(folder: Path) -> dict[str, str]:
    """Build DeepSpeed's op for ranks on CPU, which takes minutes, in `folder` or where TORCH_EXTENSIONS_DIR says. Returns what a rank needs
    in its environment to load it."""
    environment = {"TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))}
    if not AsyncIOBuilder().is_compatible(verbose=False):
        library = folder / f"lib-{os.getpid()}"            # another process may build at the same time
        library.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-fPIC", "-c", AIO / "libaio.c", "-o", library / "libaio.o"], check=True)
        subprocess.run(["ar", "rcs", library / "libaio.a", library / "libaio.o"], check=True)
        environment |= {"CPATH": str(AIO), "LIBRARY_PATH": str(library)}
    load = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=False)"
    subprocess.run([sys.executable, "-c", load], check=True, env={**os.environ, **environment, "DS_ACCELERATOR": "cpu",
                                                                   "CUDA_VISIBLE_DEVICES": ""})
    return environment


def use_plain_op() -> None:
    """Let DeepSpeed in this process read and write disks by `Handle`."""
    AsyncIOBuilder.is_compatible = lambda *_, **__: True
    AsyncIOBuilder.load = lambda *_, **__: SimpleNamespace(aio_handle=Handle)


class Handle:
    """What the op's handle does, by plain reads and writes, and as late as may be: where it is waited for."""

    pinned: set[int] = set()
    """Addresses of the buffers that one of the handles has made."""

    def __init__(self, **_: Any) -> None:
        self.waiting: list[tuple[bool, Any, str, int]] = []

    def new_cpu_locked_tensor(self, elements: int, like: Any) -> Any:
        made = like.new_empty(elements)
        self.pinned.add(made.data_ptr())
        return made

    def free_cpu_locked_tensor(self, buffer: Any) -> None:
        self.pinned.discard(buffer.data_ptr())

    def is_pinned(self, buffer: Any) -> bool:
        return buffer.untyped_storage().data_ptr() in self.pinned

    def async_pread(self, buffer: Any, path: str, offset: int) -> int:
        self.waiting.append((False, buffer, path, offset))
        return 0

    def async_pwrite(self, buffer: Any, path: str, offset: int) -> int:
        self.waiting.append((True, buffer, path, offset))
        return 0

    def wait(self) -> int:
        """Returns how many there were."""
        import torch

        done, self.waiting = self.waiting, []
        for writes, buffer, path, offset in done:
            part = memoryview(buffer.detach().view(torch.uint8).numpy())
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                assert (os.pwrite(file, part, offset) if writes else os.preadv(file, [part], offset)) == len(part)
            finally:
                os.close(file)
        return len(done)
