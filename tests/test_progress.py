"""The same records on a terminal, in a log, and across the wire."""

import contextlib
import io
import itertools
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from distlm import progress
from distlm.cluster import quiet
from distlm.progress import JsonProgress, Logged, PlainProgress, Progress, RichProgress, draw, figures, parse


class Kept(Progress):
    def __init__(self):
        self.records = []

    def show(self, record):
        self.records.append(record)


def tell(to: Progress) -> None:
    """One job's worth of calls."""
    with to:
        to.stage("train", "a")
        for step in range(1, 301):
            to.update("steps", step, 300, loss=4.25, tokens_per_s=5100.4)
        to.note("3 documents [not UTF-8] rejected")
        to.table("result [x]", [("betas", "[0.9, 0.95]"), ("path", "[/bold]")], header=("key", "value"))


def test_records_across_the_wire_show_as_they_would_here(capsys):
    tell(JsonProgress())
    lines = capsys.readouterr().out.splitlines()
    records = [parse(line) for line in lines]
    assert all(records) and len(lines) < 10, "updates are thinned"
    kept = Kept()
    tell(kept)
    assert records[0] == kept.records[0] and records[-2] == kept.records[-2]
    last = [r for r in records if r["distlm"] == "update"][-1]
    assert last["done"] == last["total"] == 300, "the last update is never thinned"
    shown = [io.StringIO(), io.StringIO()]
    for text, source in zip(shown, (records, kept.records), strict=True):
        for record in source:
            draw(Console(file=text, width=100), record)
    assert shown[0].getvalue() == shown[1].getvalue()


@pytest.mark.parametrize("kind", [PlainProgress, JsonProgress])
def test_an_update_that_only_repeats_the_line_before_it_is_no_line(kind, monkeypatch, capsys):
    clock = itertools.count(100, 60)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = kind()
    for done in (1, 1, 2, 3, 3):
        shown.update("trials", done, 3, best=4.5)
    shown.update("trials", 3, 3, best=4.0)
    shown.stage("tune", "another")
    shown.update("trials", 3, 3, best=4.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6, lines
    assert [i for i, line in enumerate(lines) if "another" in line] == [4]


def test_an_update_that_was_thinned_out_is_a_line_when_it_is_made_again(monkeypatch, capsys):
    times = iter([0, 0, 1, 20, 20])              # two looks where a line is made, else one
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(times) + 100))
    shown = PlainProgress()
    for done in (0, 1, 1, 1):
        shown.update("trials", done, 3)
    assert capsys.readouterr().out.splitlines() == ["  trials 0/3", "  trials 1/3"]


def test_what_is_shown_is_kept_in_a_file_too_and_a_full_disk_costs_the_log_alone(tmp_path):
    kept = Kept()
    tell(Logged(kept, tmp_path / "logs" / "driver.log"))
    records = [parse(line) for line in (tmp_path / "logs" / "driver.log").read_text().splitlines()]
    assert len(kept.records) == 303 and records[0] == kept.records[0] and records[-2] == kept.records[-2] and len(records) < 10
    full = Kept()
    tell(Logged(full, Path("/dev/full")))
    assert full.records == kept.records


@pytest.mark.parametrize("kind", ["plain", "json", "bars"])
def test_a_job_whose_reader_has_gone_goes_on_and_keeps_its_log(kind, tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with contextlib.suppress(BrokenPipeError), open(write, "w") as out:
        monkeypatch.setattr(progress.sys, "stdout", out)
        console = progress.Shown(file=out, force_terminal=True)
        shown = {"plain": PlainProgress, "json": JsonProgress, "bars": lambda: RichProgress(console)}[kind]()
        with shown:
            tell(Logged(shown, tmp_path / "driver.log"))
        with pytest.raises(BrokenPipeError):
            shown.note("a verb that shows what others do ends")
    texts = [record.get("text", "") for record in map(parse, (tmp_path / "driver.log").read_text().splitlines()) if record]
    assert "3 documents [not UTF-8] rejected" in texts and len([text for text in texts if "nothing is shown any more" in text]) == 1


def test_brackets_are_shown_as_they_are(capsys):
    tell(PlainProgress())
    out = capsys.readouterr().out
    assert "[0.9, 0.95]" in out and "[/bold]" in out and "[not UTF-8]" in out and "result [x]" in out and "\\[" not in out
    assert "\x1b" not in out, "a log has no control codes"
    assert "steps 300/300 loss 4.25  tokens/s 5,100" in out


def test_a_terminal_gets_a_bar_a_unit():
    text = io.StringIO()
    tell(RichProgress(Console(file=text, width=110, force_terminal=True, highlight=False)))
    out = text.getvalue()
    assert "steps" in out and "300/300" in out and "[not UTF-8]" in out and "[0.9, 0.95]" in out


def test_bars_leave_standard_error_to_the_log_and_to_what_is_told_after_an_interrupt(tmp_path, capsys):
    text = io.StringIO()
    with contextlib.suppress(KeyboardInterrupt), RichProgress(Console(file=text, force_terminal=True)) as shown:
        with quiet(tmp_path / "log"):
            shown.update("steps", 1, 300)
            print("a warning of Ray's", file=sys.stderr)
            raise KeyboardInterrupt
    print("stopped", file=sys.stderr)
    assert capsys.readouterr().err == "stopped\n"
    assert (tmp_path / "log").read_text() == "a warning of Ray's\n" and "warning" not in text.getvalue()


@pytest.mark.parametrize("line", ["", "hello", '{"a": 1}', '{"distlm": "update", "done', "2026 INFO x"])
def test_other_output_of_a_job_is_no_record(line):
    assert parse(line) is None


def test_what_stdout_is_decides(monkeypatch):
    monkeypatch.setenv("DISTLM_PROGRESS", "json")
    assert isinstance(Progress.for_stdout(), JsonProgress)
    monkeypatch.delenv("DISTLM_PROGRESS")
    monkeypatch.setattr(progress.sys, "stdout", io.StringIO())
    assert isinstance(Progress.for_stdout(), PlainProgress)


def test_updates_without_a_total_are_shown(capsys):
    PlainProgress().update("documents", 1200)
    assert capsys.readouterr().out == "  documents 1,200\n"


def test_figures_are_short():
    shown = figures({"loss": 4.256789, "tokens_per_s": 12345.6, "step": 1200, "lr": 3e-05})
    assert shown == "loss 4.257  tokens/s 12,346  step 1,200  lr 3e-05"


def test_a_line_of_training_fits_120_columns_on_a_terminal_and_in_a_log(capsys):
    record = {"loss": 10.256789, "val_loss": 10.306789, "lr": 0.00012345, "grad_norm": 123.456, "tokens_per_s": 1234567.8, "mfu": 0.4123,
              "memory_bytes": 141_234_567_890, "eta_s": 300_000.4}
    PlainProgress().update("steps", 99_999, 100_000, **record)
    [line] = capsys.readouterr().out.splitlines()
    assert line == ("  steps 99,999/100,000 loss 10.26  val 10.31  lr 0.000123  norm 123  tokens/s 1,234,568  mfu 41%  141 GB  "
                    "eta 83:20:00")
    assert len(line) <= 120
    text = io.StringIO()
    with RichProgress(Console(file=text, width=120, force_terminal=True, highlight=False, color_system=None)) as shown:
        shown.update("steps", 99_999, 100_000, **record)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).strip().splitlines()[-1].rstrip()
    assert last.endswith("mfu 41%  141 GB") and "eta" not in last and len(last) <= 120
