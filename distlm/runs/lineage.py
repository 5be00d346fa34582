"""What a job was made of: code, packages, hardware, seed, inputs."""

import hashlib
import platform
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("distlm", "torch", "ray", "deepspeed", "transformers", "tokenizers", "pyarrow", "numpy")


def lineage(spec: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """The record that lineage.json keeps. `inputs` name what the job reads, e.g. corpus and its manifest hash."""
    return {"created": time.time(), "kind": spec.get("kind"), "name": spec.get("name"), "seed": spec.get("seed"), "inputs": inputs,
            "code": _git(Path(__file__).parent), "packages": {name: _version(name) for name in PACKAGES},
            "hardware": {"host": socket.gethostname(), "machine": platform.machine(), "python": platform.python_version(),
                         "cpus": psutil.cpu_count(), "memory_bytes": psutil.virtual_memory().total,
                         "gpus": _gpus()}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _gpus() -> list[str]:
    """The names of this host's NVIDIA GPUs; the workers may have others."""
    try:
        found = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=10,
                               check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in found.stdout.splitlines() if line.strip()]


def _git(folder: Path) -> dict[str, str]:
    """The commit that the code is of, and a hash of what differs from it; empty where it is installed without git."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", __file__)       # an installed copy may lie inside somebody else's repository
        commit, changes = git("rev-parse", "HEAD").strip(), git("diff", "HEAD", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "diff": hashlib.sha256(changes.encode()).hexdigest()[:16] if changes else ""}
