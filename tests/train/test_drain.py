"""Ray's notice of a node that will be drained is passed on where a rank is on that node. test_nodes.py drains a real one."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import ray

from distlm.runs import RunFolder
from distlm.storage import read_json
from distlm.train import drain, preempt
from distlm.train.drain import drains_passed_on, write_nodes
from tests.records import Records

Answers: TypeAlias = "list[dict[str, int] | Exception]"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """What the cluster answers, look by look; the last one for ever."""
    answers: Answers = []

    def answer() -> dict[str, int]:
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(drain, "draining_nodes", answer)
    monkeypatch.setattr(drain, "LOOK_S", 0.01)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": name, "NodeManagerAddress": f"10.0.0.{name}"} for name in "123"])
    return answers


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_drained_node_that_has_a_rank_is_passed_on_once_with_what_is_left(tmp_path: Path, looks: Answers) -> None:
    folder, shown, now = RunFolder(tmp_path), Records(), time.time()
    looks += [{}, {"3": 0, "2": int((now + 90) * 1e3)}]
    with drains_passed_on(folder, shown):
        until(lambda: len(looks) == 1)
        assert not (tmp_path / preempt.DRAIN).exists(), "the ranks are not there yet"
        write_nodes(tmp_path, ["1", "2", "1", "2"])
        until((tmp_path / preempt.DRAIN).exists)
        found = read_json(tmp_path / preempt.DRAIN)
        until(folder.events)
        looks += [{"1": 1}]
    assert found["what"] == "Ray drains the node 10.0.0.2" and abs(found["time"] - now) < 30 and 60 < found["left_s"] <= 90
    [event] = folder.events()
    assert event["state"] == "note" and event["nodes"] == ["2"] and event["left_s"] == found["left_s"]
    assert shown.notes == [event["message"]] == [
        f"Ray drains the node 10.0.0.2, with {found['left_s']:.4g} s left: rank 1, 3 is there, and all save after their step"]


def test_a_node_that_stays_drained_stops_no_group_that_is_elsewhere(tmp_path: Path, looks: Answers) -> None:
    folder, shown = RunFolder(tmp_path), Records()
    looks += [{"2": 0}]
    write_nodes(tmp_path, ["1", "2"])
    (tmp_path / preempt.DRAIN).touch()                     # both are those of the group before
    with drains_passed_on(folder, shown):
        assert not (tmp_path / preempt.DRAIN).exists() and not (tmp_path / drain.NODES).exists()
        write_nodes(tmp_path, ["1", "3"])
        for answer in ({"2": 0}, {"2": 0}, {"2": 0}):
            looks.append(answer)
        until(lambda: len(looks) == 1)
        assert not (tmp_path / preempt.DRAIN).exists() and not shown.notes
        looks += [{"2": 0, "3": 0}]
        until((tmp_path / preempt.DRAIN).exists)
        assert read_json(tmp_path / preempt.DRAIN)["left_s"] is None
        until(lambda: "10.0.0.3, without a deadline" in shown.text)
    assert not [*tmp_path.glob("*.json")], "nothing is left behind"


def test_a_cluster_that_does_not_tell_is_noted_once_and_ends_nothing(tmp_path: Path, looks: Answers) -> None:
    folder, shown = RunFolder(tmp_path), Records()
    looks += [AttributeError("get_draining_nodes"), RuntimeError("later"), {"1": 0}]
    with drains_passed_on(folder, shown):
        write_nodes(tmp_path, ["1"])
        until((tmp_path / preempt.DRAIN).exists)
        until(lambda: len(folder.events()) == 2)
    assert [event["message"] for event in folder.events()] == shown.notes
    assert shown.notes[0] == "whether Ray drains a node is not known: AttributeError: get_draining_nodes" and len(shown.notes) == 2


def test_the_watch_ends_with_its_group(tmp_path: Path, looks: Answers) -> None:
    looks += [{"1": 0}]
    with contextlib.suppress(KeyError), drains_passed_on(RunFolder(tmp_path), Records()):
        raise KeyError
    write_nodes(tmp_path, ["1"])
    time.sleep(0.2)
    assert not (tmp_path / preempt.DRAIN).exists()
