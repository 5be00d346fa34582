"""The command line as a user meets it: in processes of its own, by exit code, stdout and stderr."""

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from distlm import execute
from distlm.cli import jobs, terminal
from distlm.errors import InputError
from distlm.progress import Logged, Progress
from distlm.runs import RunFolder
from distlm.storage import write_json
from tests.codes import INTERRUPTED

VERBS = ["init", "plan", "run", "profile", "submit", "status", "logs", "stop", "runs", "query", "explain", "dashboard", "cluster up",
         "cluster down", "cluster status"]
SPEC = """kind: prepare
name: words
sources: [{folder}/texts]
tokenizer: {{train: bytes}}
context: 32
workers: 1
"""


@pytest.fixture
def distlm(tmp_path, monkeypatch):
    """Run `distlm` with storage and working directory in tmp_path."""
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "DISTLM_STORAGE": str(tmp_path / "store"), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    for name in ("RAY_ADDRESS", "DISTLM_DEBUG", "DISTLM_PROGRESS"):
        environment.pop(name, None)

    def call(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, "-m", "distlm", *words], env={**environment, **more}, capture_output=True, text=True,
                              timeout=120)

    call.environment = environment
    return call


def made(root: Path, kind: str, name: str, *events: tuple[str, str], metrics=()) -> RunFolder:
    folder = RunFolder(root / kind / name)
    for state, cause in events:
        folder.event(state, cause)
    for record in metrics:
        folder.metrics(record)
    return folder


def test_help_fits_a_screen_and_names_every_verb(distlm):
    help_ = distlm("--help")
    assert help_.returncode == 0 and len(help_.stdout.splitlines()) <= 30
    assert max(map(len, help_.stdout.splitlines())) <= 80 and "..." not in help_.stdout.split("Commands:")[1]
    for verb in VERBS:
        assert verb.split()[0] in help_.stdout


def test_help_is_quick_and_imports_nothing_heavy(distlm):
    def once() -> float:                                   # of the processor: a busy machine makes nobody fail
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        distlm("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(once() for _ in range(3)) < 0.5
    code = ("import sys\nfrom distlm import cli\n"
            "try: cli.main(['plan', 'no.yaml'])\nexcept SystemExit as e: print(e.code)\n"
            "print([m for m in ('torch', 'ray', 'transformers', 'deepspeed') if m in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], env=distlm.environment, capture_output=True, text=True).stdout.split("\n")
    assert found[:2] == ["2", "[]"]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_an_example(verb, distlm):
    assert f"Example: distlm {verb}" in distlm(*verb.split(), "--help").stdout


def test_shell_completion_offers_verbs_specs_and_names(distlm, tmp_path):
    made(tmp_path / "store", "runs", "py-10m", ("starting", ""), ("succeeded", "completed"))
    (tmp_path / "train.yaml").write_text("")

    def complete(line: str) -> list[str]:
        words = line.split(" ")
        return distlm(_DISTLM_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=str(len(words) - 1)).stdout.split()

    assert {"status", "stop"} <= set(complete("distlm st"))
    assert complete("distlm status py") == ["py-10m"]
    assert complete("distlm run tr") == ["train.yaml"]
    script = distlm(_DISTLM_COMPLETE="source_bash").stdout
    asked = subprocess.run(["bash", "-c", f"{script}\nCOMP_WORDS=(distlm status py) COMP_CWORD=2; _distlm_completion distlm; "
                            "echo ${COMPREPLY[@]}"], capture_output=True, text=True,
                           env={**distlm.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert asked.stdout.split() == ["py-10m"], asked.stderr


def test_mistakes_are_one_line_on_stderr_and_exit_2(distlm, tmp_path):
    (tmp_path / "bad.yaml").write_text("kind: prepare\nname: words\nsource: [x]\nsources: [x]\n")
    for words, said in [(["run", "bad.yaml"], "bad.yaml:3: source: unknown key; did you mean sources?"),
                        (["run", "no.yaml"], "no such file"),
                        (["bogus"], "No such command"), (["run"], "Missing argument"), (["status", "nobody"], "there is no job 'nobody'"),
                        (["query", "nobody", "x"], "there is no endpoint"), (["dashboard"], "no metrics"),
                        (["profile", "nobody"], "there is no job 'nobody'"), (["profile", "no.yaml"], "no such file"),
                        (["plan", "bad.yaml", "--set", "context"], "is no override")]:
        done = distlm(*words)
        assert done.returncode == 2 and said in done.stderr, (words, done.stderr)
        assert done.stdout == "" and all(line.startswith("distlm: error: ") for line in done.stderr.splitlines())


def test_a_traceback_is_shown_under_debug_alone(distlm):
    assert "Traceback" not in distlm("run", "no.yaml").stderr
    assert "Traceback" in distlm("run", "no.yaml", "--debug").stderr
    assert "Traceback" in distlm("run", "no.yaml", DISTLM_DEBUG="1").stderr


@pytest.mark.parametrize(("number", "handler", "ends"), [(signal.SIGHUP, signal.SIG_IGN, False), (signal.SIGINT, signal.SIG_IGN, True)])
def test_a_hang_up_stops_a_job_unless_it_is_ignored(number, handler, ends, tmp_path, monkeypatch):
    """nohup ignores it; a script's background ignores Ctrl-C, and does not go on without its terminal for that."""
    (tmp_path / "words.yaml").write_text(SPEC.format(folder=tmp_path))
    monkeypatch.setattr(execute, "run", lambda *_, **__: signal.raise_signal(signal.SIGHUP))
    before = {one: signal.getsignal(one) for one in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(number, handler)
        with pytest.raises(KeyboardInterrupt) if ends else contextlib.nullcontext():
            jobs.run(tmp_path / "words.yaml")
    finally:
        for one, was in before.items():
            signal.signal(one, was)


class Interrupted(io.StringIO):
    """A terminal at which Ctrl-C is pressed."""

    def readline(self, *_):
        raise KeyboardInterrupt


@pytest.mark.parametrize(("stdin", "error", "said"), [
    (Interrupted(), typer.Abort, None), (io.StringIO("n\n"), typer.Abort, None),
    (io.StringIO(), InputError, r"Go on\? Nobody answers.*--yes"), (None, InputError, "Nobody answers")])
def test_a_question_that_nobody_can_answer_is_a_mistake_and_no_interrupt(stdin, error, said, monkeypatch):
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(error, match=said):
        terminal.confirm("Go on?")


def test_no_cluster_and_no_storage_exit_4(distlm, tmp_path):
    (tmp_path / "ok.yaml").write_text(SPEC.format(folder=tmp_path))
    for done in (distlm("cluster", "status"), distlm("submit", "ok.yaml"), distlm("cluster", "status", RAY_ADDRESS="http://127.0.0.1:1"),
                 distlm("runs", DISTLM_STORAGE="s3://bucket")):
        assert done.returncode == 4 and done.stderr.startswith("distlm: error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "store" / "corpora").exists()


def test_init_writes_specs_that_plan_and_overwrites_nothing(distlm, tmp_path):
    assert distlm("init", "new").returncode == 0
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["average.yaml", "compress.yaml", "distlm.schema.json", "evaluate.yaml", "pipeline.yaml", "prepare.yaml", "serve.yaml",
                     "train.yaml", "tune.yaml"]
    for name in {*files} - {"distlm.schema.json"}:
        assert (tmp_path / "new" / name).read_text().splitlines()[0] == "# yaml-language-server: $schema=distlm.schema.json"
    (tmp_path / "new" / "train.yaml").write_text("mine")
    for name in ("new/train.yaml", "new/train.yaml/deeper"):
        onto = distlm("init", name)
        assert onto.returncode == 2 and "new/train.yaml: this is a file, and the specs need a folder; name another" in onto.stderr
    again = distlm("init", "new")
    assert again.returncode == 2 and "train.yaml" in again.stderr and (tmp_path / "new" / "train.yaml").read_text() == "mine"
    models = distlm("plan", "new/pipeline.yaml")
    assert models.returncode == 0 and models.stderr == "", "libraries say what no user can use"
    shown = distlm("plan", "new/prepare.yaml", "--set", "context=64").stdout
    assert ["context", "64", "--set"] in [line.split() for line in shown.splitlines()]
    assert ["tokenizer.vocab_size", "4096", "prepare.yaml:7"] in [line.split() for line in shown.splitlines()]
    assert ["dedup.exact", "true", "default"] in [line.split() for line in shown.splitlines()]


def test_runs_and_status_tell_state_cause_and_progress(distlm, tmp_path):
    store = tmp_path / "store"
    made(store, "runs", "good", ("starting", ""), ("succeeded", "completed"), metrics=[{"step": 1, "loss": 8.5}, {"step": 2, "loss": 4.25,
                                                                                                               "val_loss": 4.5}])
    made(store, "sweeps", "worse", ("starting", ""), ("failed", "oom"))
    made(store, "corpora", "good", ("starting", ""), ("succeeded", "completed"))
    listed = json.loads(distlm("runs", "--json").stdout)
    assert {(job["kind"], job["name"], job["state"], job["cause"]) for job in listed} == {
        ("train", "good", "succeeded", "completed"), ("tune", "worse", "failed", "oom"), ("prepare", "good", "succeeded", "completed")}
    table = distlm("runs").stdout
    assert "4.25" in table and "oom" in table and "loss" in table
    both = distlm("status", "good")
    assert both.returncode == 2 and "runs/good" in both.stderr and "corpora/good" in both.stderr
    one = json.loads(distlm("status", "runs/good", "--json").stdout)
    assert one["metrics"] == {"step": 2, "loss": 4.25, "val_loss": 4.5} and one["ended"] >= one["started"]
    assert "did you mean worse?" in distlm("status", "wors").stderr


def closed_after(lines: int, words: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """The exit code of `distlm` and its standard error, where the reader of its output leaves after so many lines."""
    with subprocess.Popen([sys.executable, "-m", "distlm", *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True, bufsize=1) as process:
        for _ in range(lines):
            assert process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    return process.returncode, said


@pytest.mark.parametrize("words", [["runs"], ["runs", "--json"], ["logs", "run-0"]])
def test_a_verb_whose_reader_has_seen_enough_ends_quietly(words, distlm, tmp_path):
    for i in range(400):                                   # more than a pipe holds
        made(tmp_path / "store", "runs", f"run-{i}", ("starting", ""), ("succeeded", "completed"))
    with Logged(Progress(), tmp_path / "store" / "runs" / "run-0" / "logs" / "driver.log") as log:
        for i in range(400):
            log.note(f"{i} " * 100)
    assert closed_after(1, words, distlm.environment) == (0, "")


@pytest.mark.slow
def test_a_job_whose_reader_has_gone_is_done_all_the_same(distlm, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words " * 1000)
    (tmp_path / "words.yaml").write_text(SPEC.format(folder=tmp_path))
    assert closed_after(1, ["run", "words.yaml"], distlm.environment) == (0, "")
    assert RunFolder(tmp_path / "store" / "corpora" / "words").state() == ("succeeded", "completed")


def test_a_job_that_died_without_a_word_has_failed(distlm, tmp_path):
    code = ("import os, sys; from pathlib import Path; from distlm.runs import RunFolder; "
            "RunFolder(Path(sys.argv[1])).event('starting'); os._exit(1)")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "store" / "runs" / "gone")], check=False)
    job = json.loads(distlm("status", "gone", "--json").stdout)
    assert (job["state"], job["cause"]) == ("failed", "head_lost") and job["ended"]


@pytest.mark.parametrize("number", [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGHUP))])
def test_an_interrupted_run_is_recorded_as_stopped_by_the_user(number, distlm, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words " * 1000)
    (tmp_path / "words.yaml").write_text(SPEC.format(folder=tmp_path))
    folder = RunFolder(tmp_path / "store" / "corpora" / "words")
    process = subprocess.Popen([sys.executable, "-m", "distlm", "run", "words.yaml", "--set", "clean={min_chars: 2}"],
                               env={**distlm.environment, "PYTHONFAULTHANDLER": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (folder.exists() and folder.events()) and time.monotonic() < deadline:
        time.sleep(0.05)
    if number == signal.SIGHUP:                            # a terminal that is closed tells all, while Ray starts too
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    try:
        _, said = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:                      # where it hangs is in what it says
        process.send_signal(signal.SIGABRT)
        _, said = process.communicate()
    assert process.returncode in INTERRUPTED, said
    assert folder.state() == ("stopped", "user") and "Traceback" not in said
    assert "go on with `distlm run words.yaml --set 'clean={min_chars: 2}' --resume`" in said


PIPELINE = """kind: pipeline
name: way
steps:
  train: {kind: train, corpus: words, model: {preset: llama-tiny}, duration: {steps: 1}}
  first: {kind: serve, model: "${train}", port: 0}
  second: {kind: serve, model: "${train}", port: 0, name: ask}
"""


@pytest.mark.parametrize("kind", ["pipeline", "serve"])
def test_an_interrupt_says_which_endpoints_go_on_and_how_to_stop_them(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DISTLM_STORAGE", str(tmp_path))
    (tmp_path / "way.yaml").write_text(PIPELINE if kind == "pipeline" else "kind: serve\nname: ask\nmodel: tiny\n")
    for name in ("way-first", "ask", "foreign"):
        write_json(tmp_path / "endpoints" / name / "endpoint.json", {"url": f"http://127.0.0.1:1/{name}/v1"})
    monkeypatch.setattr(execute, "healthy", lambda record: "way-first" not in record["url"])      # it went with its cluster

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "run", interrupted)
    before = {one: signal.getsignal(one) for one in (signal.SIGHUP, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt):
            jobs.run(tmp_path / "way.yaml")
    finally:
        for one, was in before.items():
            signal.signal(one, was)
    go_on = [f"stopped; go on with `distlm run {tmp_path / 'way.yaml'} --resume`"] if kind == "pipeline" else []
    assert capsys.readouterr().err.splitlines() == [*go_on, "ask goes on at http://127.0.0.1:1/ask/v1: `distlm stop ask` ends it"]


@pytest.mark.slow                                          # tests/test_submit.py has logs of such a job, and a run of one within a cluster
def test_logs_shows_the_progress_of_a_job_that_was_not_submitted(distlm, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("words " * 1000)
    (tmp_path / "words.yaml").write_text(SPEC.format(folder=tmp_path))
    ran = distlm("run", "words.yaml")
    shown = distlm("logs", "words").stdout
    assert ran.returncode == 0 and "prepare words" in shown and "a cluster for this job alone" in shown, ran.stderr
    assert set(ran.stdout.splitlines()) <= set(shown.splitlines())


def test_dashboard_serves_tensorboard_until_interrupted(distlm, tmp_path):
    import httpx
    from torch.utils.tensorboard import SummaryWriter

    for trial in ("a", "b"):
        made(tmp_path / "store" / "sweeps" / "lr", "trials", trial, ("starting", ""), ("succeeded", "completed"))
        with SummaryWriter(str(tmp_path / "store" / "sweeps" / "lr" / "trials" / trial / "tensorboard")) as writer:
            writer.add_scalar("loss", 1.0, 1)
    made(tmp_path / "store", "sweeps", "lr", ("starting", ""), ("succeeded", "completed"))
    process = subprocess.Popen([sys.executable, "-m", "distlm", "dashboard", "lr"], env=distlm.environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        url = line.split()[1]
        assert url.startswith("http://127.0.0.1:") or url.startswith("http://localhost:"), line
        deadline, found = time.monotonic() + 30, []
        while len(found) < 2 and time.monotonic() < deadline:
            found = httpx.get(url.rstrip("/") + "/data/runs", trust_env=False).json()
            time.sleep(0.2)
        assert sorted(found) == ["lr/a", "lr/b"]
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 0, said
