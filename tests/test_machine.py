"""What a container may have of a machine is all the memory that there is."""

from pathlib import Path

import psutil
import pytest

from distlm import machine


def test_a_container_s_limit_is_the_memory_where_it_is_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, file = psutil.virtual_memory().total, tmp_path / "memory.max"
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (file, tmp_path / "none"))
    for text, expected in ((None, whole), ("max\n", whole), (f"{2**62}\n", whole), ("1048576\n", 1 << 20)):
        if text:
            file.write_text(text)
        assert machine.machine_memory() == expected
