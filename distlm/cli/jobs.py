"""The commands for jobs."""

import contextlib
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distlm.cli.options import Json, Name, Resume, Sets, SpecFile, names, specs
from distlm.cli.terminal import hang_up, interrupt, print_json, report_error, say, show, show_rows, shown
from distlm.errors import ClusterError, DistlmError, InputError
from distlm.storage import Storage

if TYPE_CHECKING:
    from distlm.jobs import Job, Submission

app = typer.Typer()


@app.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to.")] = Path(".")) -> None:
    """Write starter specs, and a schema for editors.

    Example: distlm init my-project
    """
    from distlm.init import init as write

    for path in write(folder):
        print(path)


@app.command()
def plan(spec: SpecFile, set_: Sets = None, cluster: Annotated[Path | None, typer.Option(
        metavar="FILE", help="A file of `ray up` whose metadata.price_per_hour says what its nodes cost.")] = None) -> None:
    """Show every value, its origin, and what the job needs.

    Example: distlm plan train.yaml --set scale.workers=8
    """
    from distlm import clusterfile
    from distlm.errors import SpecError
    from distlm.execute import resolve
    from distlm.head import LocalCluster
    from distlm.plan import needs
    from distlm.progress import PlainProgress
    from distlm.spec.load import dotted, dump, leaves
    from distlm.storage import Storage

    loaded = resolve(spec, set_ or [])
    file = clusterfile.read(cluster) if cluster else None
    if isinstance(file, LocalCluster):
        raise SpecError("is of a cluster on this machine, which has no price", where=str(cluster), remedy="leave --cluster out")
    required: list[tuple[str, ...]] = list(needs(loaded, Storage.find(loaded.spec.storage), file))
    values = [(dotted(key), shown(value)) for key, value in leaves(dump(loaded.spec))]
    rows = [(key, value, loaded.origins.get(key, "")) for key, value in values]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for key, value, origin in rows:
        print(f"{key:<{widths[0]}}  {value:<{min(widths[1], 40)}}  {origin}".rstrip())
    PlainProgress().table("\nneeds", required)


@app.command()
def run(spec: SpecFile, set_: Sets = None, resume: Resume = False) -> None:
    """Do a job here, in the cluster that is up or one of its own.

    Example: distlm run train.yaml --set optimizer.lr=0.001
    """
    from distlm.cluster import import_ray
    from distlm.execute import answering, resolve
    from distlm.execute import run as run_job
    from distlm.storage import Storage

    loaded = resolve(spec, set_ or [])                     # mistakes before the second that Ray takes
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, hang_up)
    try:
        import_ray()
        run_job(spec, overrides=set_ or [], resume=resume)
    except KeyboardInterrupt:
        if loaded.spec.kind != "serve":
            words = shlex.join(["distlm", "run", str(spec), *(word for text in set_ or [] for word in ("--set", text)), "--resume"])
            say(f"stopped; go on with `{words}`")
        with contextlib.suppress(DistlmError):
            for name, url in answering(loaded.spec, Storage.find(loaded.spec.storage)).items():
                say(f"{name} goes on at {url}: `distlm stop {name}` ends it")
        raise


@app.command()
def profile(spec: Annotated[str, typer.Argument(metavar="SPEC", help="A training spec, or a run by name.", autocompletion=specs)],
            set_: Sets = None) -> None:
    """Show where ten training steps go, and leave a trace.

    Example: distlm profile train.yaml --set batch.micro_sequences=8
    """
    from distlm import jobs
    from distlm.cluster import import_ray
    from distlm.execute import profile as profile_job
    from distlm.execute import resolve

    path = Path(spec)
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        path = jobs.locate(spec, Storage.find()).folder
    if path.is_dir():
        path = path / "spec.yaml"
    resolve(path, set_ or [])
    signal.signal(signal.SIGTERM, interrupt)
    import_ray()
    profile_job(path, overrides=set_ or [])


@app.command()
def submit(spec: SpecFile, set_: Sets = None, resume: Resume = False,
           follow: Annotated[bool | None, typer.Option("--follow/--no-follow", "-f",
                                                       help="Show its progress. Default: on a terminal.")] = None,
           working_dir: Annotated[Path | None, typer.Option(help="The files that go along. Default: this folder.")] = None) -> None:
    """Send a job to the cluster, with the files of this folder.

    Example: distlm submit train.yaml --follow
    """
    from distlm import cluster
    from distlm.submitting import submit as send

    submission = send(spec, overrides=set_ or [], resume=resume, working_dir=working_dir)
    print(f"submitted {submission.id}\ndashboard {cluster.shown(submission.dashboard_url, submission.token_file)}")
    if submission.left_out:
        more = len(submission.left_out) - 4
        print(f"not taken along: {', '.join(submission.left_out[:4])}{f' and {more:,} more' if more > 0 else ''}")
    if sys.stdout.isatty() if follow is None else follow:
        _follow(submission)
    else:
        print(f"`distlm logs -f {submission.folder.name}` follows it, `distlm stop {submission.folder.name}` ends it")


@app.command()
def status(name: Name, as_json: Json = False) -> None:
    """Show how a job stands.

    Example: distlm status my-run
    """
    from distlm import jobs

    job = jobs.locate(name, Storage.find())
    if as_json:
        print_json(jobs.to_dict(job))
        return
    rows = [("state", f"{job.state}{f' ({job.cause})' if job.cause else ''}"), ("message", job.message), ("duration", _duration(job)),
            *((key, _number(job.metrics[key])) for key in ("step", "tokens", "loss", "val_loss", "tokens_per_s", "mfu")
              if key in job.metrics),
            ("submission", job.submission), ("dashboard", _dashboard()), ("folder", str(job.folder))]
    print(f"{job.kind} {job.name}")
    for key, value in rows:
        if value:
            print(f"  {key:<13} {value}")


@app.command()
def logs(name: Name, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False) -> None:
    """Show what a job has written; -f outlives a broken connection.

    Example: distlm logs -f my-run
    """
    from distlm import jobs, logs

    job = jobs.locate(name, Storage.find())
    submission = None
    if job.submission:
        with contextlib.suppress(ClusterError):            # its cluster has gone: what its driver wrote remains
            submission = jobs.submission_of(job)
            if jobs.ray_job(submission) is None:
                submission = None
    if submission and follow:
        _follow(submission)
    elif submission:
        show(iter(logs.logs(submission).splitlines()))
    else:
        show(logs.driver_log(job, follow))


@app.command()
def stop(name: Name, force: Annotated[bool, typer.Option("--force", help="Record the end even of a job whose machine is gone.")] = False
         ) -> None:
    """End a job, or take an endpoint down.

    Example: distlm stop my-run
    """
    from distlm.stopping import stop as end

    job = end(name, Storage.find(), force=force)
    print(f"{job.kind} {job.name} {job.state} ({job.cause}){'' if job.message in ('', 'stopped') else ': ' + job.message}")


@app.command()
def runs(as_json: Json = False) -> None:
    """List all jobs under the storage root.

    Example: distlm runs
    """
    from distlm import jobs
    from distlm.progress import PlainProgress

    found = jobs.jobs(Storage.find())
    if as_json:
        print_json([jobs.to_dict(job) for job in found])
    elif not found:
        print(f"no jobs under {Storage.find().root}")
    else:
        rows: list[tuple[str, ...]] = [
            (job.kind, job.name, job.state, job.cause, _time(job.started), _duration(job), _number(job.metrics.get("loss")),
             _number(job.metrics.get("val_loss"))) for job in found]
        PlainProgress().table("", rows, ("kind", "name", "state", "cause", "started", "duration", "loss", "val_loss"))


@app.command()
def query(name: Name, prompt: Annotated[str, typer.Argument(help="The text to complete, or to classify.")],
          max_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens at most. Default: the endpoint's.")] = None,
          temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
          model: Annotated[str | None, typer.Option(help="An adapter of the endpoint by its name. Default: its model without one.")] = None,
          chat: Annotated[bool, typer.Option("--chat", help="The text is what a user says in a chat.")] = False) -> None:
    """Complete or classify a text with an endpoint, or chat with it.

    Example: distlm query my-model "def parse(" --max-tokens 32
    """
    from distlm import endpoints

    if endpoints.serves_classifier(name, Storage.find()):
        if chat or temperature or max_tokens is not None or model is not None:
            raise InputError(f"{name} is a classifier and completes no text",
                             remedy="leave out --chat, --max-tokens, --temperature and --model")
        from distlm.progress import PlainProgress
        from distlm.serve.client import CUT

        [found] = endpoints.classify(name, [prompt])
        chances = sorted(found["probabilities"].items(), key=lambda one: -one[1])
        PlainProgress().table("", [(label, f"{chance:.2%}") for label, chance in chances], ("label", "probability"))
        show_rows([("label", found["label"]) if found["label"] is not None else ("labels", ", ".join(found["labels"]) or "none"),
                   *([("truncated", CUT)] if found["truncated"] else [])])
        return
    for piece in endpoints.query(name, prompt, max_tokens, model=model, temperature=temperature, chat=chat):
        print(piece, end="", flush=True)
    print()


@app.command()
def explain(model: Annotated[str, typer.Argument(metavar="RUN", help="A run by name or path, or a folder that transformers loads.",
                                                 autocompletion=names)],
            text: Annotated[str, typer.Argument(help="The text; - reads it from standard input.")],
            target: Annotated[str | None, typer.Option(help="The next token, or the label. Default: the likeliest.")] = None,
            steps: Annotated[int, typer.Option(min=1, help="Points of the path of integrated gradients.")] = 256,
            output: Annotated[Path, typer.Option(help="The page to write.")] = Path("explain.html"),
            force: Annotated[bool, typer.Option("--force", help="Write over a page that is there.")] = False,
            as_json: Json = False) -> None:
    """Show what surprises a model, and what its prediction rests on.

    Example: distlm explain my-model "def read_lines(path):"
    """
    from transformers.utils import logging

    from distlm.attribution import explain as explained
    from distlm.attribution import write_page
    from distlm.progress import PlainProgress
    from distlm.serve.client import CUT

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")         # else DeepSpeed, which transformers looks for, warns
    if output.exists() and not force and not as_json:
        raise InputError("there is such a file already", where=str(output), remedy="give another --output, or --force")
    found = explained(model, sys.stdin.read() if text == "-" else text, target=target, steps=steps, storage=Storage.find())
    if as_json:
        print_json({**vars(found), "tokens": [vars(one) for one in found.tokens], "gap": found.gap})
        return
    write_page(found, output)
    PlainProgress().table("", [(repr(one.text), "" if one.surprisal is None else f"{one.surprisal:.2f}", f"{one.attribution:+.3f}")
                               for one in found.tokens], ("token", "bits", "nats for the target"))
    show_rows([("target", f"{found.target!r}, {found.probability:.2%}"), ("page", str(output)),
               *([("truncated", CUT)] if found.truncated else [])])
    if not found.complete:
        report_error(f"the attributions miss {found.gap:+.3f} of {found.added:+.3f} nats; raise --steps")


@app.command()
def dashboard(names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Runs or sweeps. Default: all.",
                                                                autocompletion=names)] = None,
              port: Annotated[int | None, typer.Option(help="Default: a free one.")] = None) -> None:
    """Serve TensorBoard: curves, a sweep's trials side by side.

    Example: distlm dashboard my-sweep
    """
    from distlm import dashboard as boards
    from distlm import jobs

    storage = Storage.find()
    paths = [jobs.locate(name, storage).folder for name in names] if names else boards.all_of(storage)
    signal.signal(signal.SIGTERM, interrupt)
    with boards.serve(paths, port) as url:
        print(f"TensorBoard {url}  (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


def _follow(submission: "Submission") -> None:
    """Show a submitted job to its end, and end as it did."""
    from distlm import jobs, logs
    from distlm.runs import RunFolder

    name = submission.folder.name
    try:
        show(logs.follow(submission))
    except KeyboardInterrupt:
        say(f"\n{name} goes on: `distlm logs -f {name}` follows it, `distlm stop {name}` ends it")
        raise typer.Exit(130) from None
    job = jobs.reconcile(jobs.read(RunFolder(submission.folder)))
    if job.state != "succeeded" and not (job.kind == "serve" and job.state == "running"):     # an endpoint stays
        code = (jobs.ray_job(submission) or {}).get("driver_exit_code")
        verb, message = "was" if job.state == "stopped" else "has", f": {job.message}" if job.message else ""
        report_error(f"{name} {verb} {job.state} ({job.cause}){message}")
        raise typer.Exit(code if code in (2, 4, 130) else 3)


def _number(value: Any) -> str:
    from distlm.progress import number

    return "" if value is None else number(value)


def _time(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def _duration(job: "Job") -> str:
    if job.duration_s is None:
        return ""
    minutes, seconds = divmod(round(job.duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _dashboard() -> str:
    from distlm import cluster

    try:
        found = cluster.find(Storage.find())
    except DistlmError:
        return ""
    return found.dashboard_url if found else ""
