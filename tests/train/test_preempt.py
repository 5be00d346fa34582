"""What a run is told before a machine goes reaches its ranks, and what it has for that is held against what it takes."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distlm.runs import RunFolder
from distlm.storage import write_json
from distlm.train import checkpoint, preempt
from distlm.train.preempt import GraceCheck, Notice, Request
from tests.records import Records
from tests.train.ranks import losses, make_corpus, run_ranks, spec


@pytest.mark.parametrize(("left_s", "limit"), [(None, ", where there were 30 s"), (87.0, ", where there were 87 s")])
def test_a_node_that_is_drained_is_named_by_all_ranks_with_what_it_left(tmp_path: Path, left_s: float | None, limit: str) -> None:
    corpus = make_corpus(tmp_path / "c")
    whole, run = tmp_path / "whole", tmp_path / "run"
    given = spec(corpus, scale={"workers": 2}, duration={"steps": 4}, guard={"grace_period_s": 30}, checkpoint={"every_steps": 4})
    run.mkdir()
    write_json(run / preempt.DRAIN, {"what": "Ray drains the node 10.0.0.3", "time": time.time() - 1000, "left_s": left_s})
    output = run_ranks({run: given}, preempt_before_step=99)                   # no rank is sent anything
    told = re.findall(r"TrainError: Ray drains the node 10\.0\.0\.3, and the state after step 1 is saved, (\S+) s later(.*); go on", output)
    assert len(told) >= 2 and len({*told}) == 1 and 1000 <= float(told[0][0]) < 1300 and told[0][1] == limit, output[-3000:]
    assert [path.name for path in checkpoint.committed(run)] == ["step-000001"] and len(losses(run)) == 1
    (run / preempt.DRAIN).unlink()                                             # as a driver does before it launches ranks
    run_ranks({run: given, whole: given})
    assert losses(run) == losses(whole)


def test_only_rank_0_looks_for_what_the_driver_passes_on_and_the_driver_s_own_end_comes_first(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.event("running")

    def heard(rank: int) -> Notice | None:
        request = Request(folder, rank, torch.device("cpu"))
        assert request() == (request._notice is not None)
        return request._notice

    assert heard(0) is None
    write_json(tmp_path / preempt.DRAIN, {"what": "a node", "time": 5.0, "left_s": 2.0})
    assert heard(0) == Notice("a node", 5.0, 2.0) and heard(1) is None
    (tmp_path / preempt.FLAG).touch()
    notice = heard(0)
    assert notice and notice.what == "the driver was sent SIGTERM" and abs(notice.time - time.time()) < 60 and heard(1) is None


def record(step_s: float, **more: float) -> dict[str, Any]:
    return {"step": 1, "loss": 1.0, "data_s": 1.0, "step_s": step_s, **more}


def test_a_step_and_a_checkpoint_that_do_not_fit_the_grace_period_are_said_once(tmp_path: Path) -> None:
    folder, shown = RunFolder(tmp_path), Records()

    def launch(*records: dict[str, Any]) -> list[str]:
        check, before = GraceCheck(folder, shown, 30), len(shown.notes)
        for one in records:
            check(one)
        return shown.notes[before:]

    assert launch(record(99), record(4), record(4, checkpoint_alone_s=25)) == [], "the first step has to compile"
    assert launch(record(1), *[record(99)] * 2, *[record(4)] * 20, record(4, checkpoint_alone_s=24)) == [], "as steps are by now"
    assert launch(record(1), record(99), {"step": 0, "val_loss": 1.0}) == [], "no checkpoint has been measured"
    [text] = launch(record(1), record(4), record(4, checkpoint_alone_s=20, evaluate_s=8), record(10.5), record(10.5))
    assert "guard.grace_period_s: 30 s are too few for a step of 11.5 s and a checkpoint of 20 s" in text and "micro-batches" in text
    assert [(event["message"], event["grace_period_s"]) for event in folder.events()] == [(text, 30)]
    assert launch(record(1), record(10.5, checkpoint_alone_s=20)) == [], "another launch of the run"
    (tmp_path / "events.jsonl").unlink()
    [text] = launch(record(1), record(4, evaluate_s=25.5), record(4, checkpoint_alone_s=20))
    assert "an evaluation of 25.5 s and a checkpoint of 20 s" in text and "evaluate.max_windows" in text
