"""The command line: every verb parses, calls one library function, prints. Libraries are imported inside, so that --help is quick."""

import contextlib
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distlm.errors import PREFIX, ClusterError, DistlmError, InputError

if TYPE_CHECKING:
    from distlm.jobs import Job, Submission
    from distlm.storage import Storage

app = typer.Typer(name="distlm", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="From raw text to a served language model: one YAML spec per job.")
PREAMBLE = re.compile(r"^Running entrypoint for job |job_manager\.py:\d+ -- Runtime env is setting up")
"""What Ray says before a job says anything."""
cluster_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Bring a cluster up or down.")
corpus_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into a corpus, check it, compare two.")
app.add_typer(corpus_app, name="corpus")
app.add_typer(cluster_app, name="cluster")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 the user's mistake, 3 the job failed, 4 no cluster or storage, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a thread that outlives its cluster must not start another one
    debug = "--debug" in words or os.environ.get("DISTLM_DEBUG") == "1"
    code = _run([word for word in words if word != "--debug"], debug)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:                                    # nobody reads it: Python would make 120 of the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run(words: list[str], debug: bool) -> int:
    try:
        code = app(args=words, prog_name="distlm", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Abort:
        _error("interrupted")
        return 130
    except KeyboardInterrupt:
        _error("interrupted")
        return 130
    except (BrokenPipeError, SystemExit) as error:         # typer makes the second of the first
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        return 0                                           # the reader of the pipe, `head` for one, has seen enough
    except DistlmError as error:
        if debug:
            raise
        _error(str(error))
        return error.exit_code
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message:                                        # the command line itself is wrong
            context = getattr(error, "ctx", None)
            _error(f"{message().rstrip('.')}; `{context.command_path if context else 'distlm'} --help` shows the usage")
            return 2
        if debug:
            raise
        _error(f"{type(error).__name__}: {error}".splitlines()[0] + "; `--debug` shows where")
        return 3


def _error(text: str) -> None:
    _say("\n".join(f"{PREFIX}{line}" for line in text.splitlines()))


def _say(text: str) -> None:
    """Tell on standard error, where somebody still reads it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def _names(incomplete: str) -> list[str]:
    """Names of jobs, for shell completion."""
    from distlm.storage import FOLDERS, Storage

    root = Storage.find().root
    return sorted({path.name for kind in FOLDERS.values() for path in (root / kind).glob(f"{incomplete}*") if path.is_dir()})


def _specs(incomplete: str) -> list[str]:
    """Spec files, for shell completion."""
    folder = Path(incomplete).parent if incomplete else Path(".")
    return sorted(str(path) + ("/" if path.is_dir() else "") for path in folder.glob("*")
                  if (path.is_dir() or path.suffix in (".yaml", ".yml")) and str(path).startswith(incomplete))


SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="A spec file.", autocompletion=_specs)]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value; may be given several times.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="A job's name, kind/NAME as in runs/NAME, or its folder.",
                                     autocompletion=_names)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the job of this name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
          debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also DISTLM_DEBUG=1.")] = False) -> None:
    if version:
        import distlm

        print(distlm.__version__)
        raise typer.Exit


@app.command()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to.")] = Path(".")) -> None:
    """Write starter specs, and a schema for editors.

    Example: distlm init my-project
    """
    from distlm.init import init as write

    for path in write(folder):
        print(path)


@app.command()
def plan(spec: SpecFile, set_: Sets = None) -> None:
    """Show every value, its origin, and what the job needs.

    Example: distlm plan train.yaml --set scale.workers=8
    """
    from distlm.execute import resolve
    from distlm.plan import needs
    from distlm.progress import PlainProgress
    from distlm.spec.load import dotted, dump, leaves
    from distlm.storage import Storage

    loaded = resolve(spec, set_ or [])
    required: list[tuple[str, ...]] = list(needs(loaded, Storage.find(loaded.spec.storage)))
    values = [(dotted(key), _shown(value)) for key, value in leaves(dump(loaded.spec))]
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
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
        signal.signal(signal.SIGHUP, _hang_up)
    try:
        import_ray()
        run_job(spec, overrides=set_ or [], resume=resume)
    except KeyboardInterrupt:
        if loaded.spec.kind != "serve":
            words = shlex.join(["distlm", "run", str(spec), *(word for text in set_ or [] for word in ("--set", text)), "--resume"])
            _say(f"stopped; go on with `{words}`")
        with contextlib.suppress(DistlmError):
            for name, url in answering(loaded.spec, Storage.find(loaded.spec.storage)).items():
                _say(f"{name} goes on at {url}: `distlm stop {name}` ends it")
        raise


@app.command()
def profile(spec: Annotated[str, typer.Argument(metavar="SPEC", help="A training spec, or a run by name.", autocompletion=_specs)],
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
        path = jobs.locate(spec, _storage()).folder
    if path.is_dir():
        path = path / "spec.yaml"
    resolve(path, set_ or [])
    signal.signal(signal.SIGTERM, _interrupt)
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

    job = jobs.locate(name, _storage())
    if as_json:
        _print_json(jobs.to_dict(job))
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

    job = jobs.locate(name, _storage())
    submission = None
    if job.submission:
        with contextlib.suppress(ClusterError):            # its cluster has gone: what its driver wrote remains
            submission = jobs.submission_of(job)
            if jobs.ray_job(submission) is None:
                submission = None
    if submission and follow:
        _follow(submission)
    elif submission:
        _show(iter(logs.logs(submission).splitlines()))
    else:
        _show(logs.driver_log(job, follow))


@app.command()
def stop(name: Name, force: Annotated[bool, typer.Option("--force", help="Record the end even of a job whose machine is gone.")] = False
         ) -> None:
    """End a job, or take an endpoint down.

    Example: distlm stop my-run
    """
    from distlm.stopping import stop as end

    job = end(name, _storage(), force=force)
    print(f"{job.kind} {job.name} {job.state} ({job.cause}){'' if job.message in ('', 'stopped') else ': ' + job.message}")


@app.command()
def runs(as_json: Json = False) -> None:
    """List all jobs under the storage root.

    Example: distlm runs
    """
    from distlm import jobs
    from distlm.progress import PlainProgress

    found = jobs.jobs(_storage())
    if as_json:
        _print_json([jobs.to_dict(job) for job in found])
    elif not found:
        print(f"no jobs under {_storage().root}")
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

    if endpoints.serves_classifier(name, _storage()):
        if chat or temperature or max_tokens is not None or model is not None:
            raise InputError(f"{name} is a classifier and completes no text",
                             remedy="leave out --chat, --max-tokens, --temperature and --model")
        from distlm.progress import PlainProgress

        [found] = endpoints.classify(name, [prompt])
        chances = sorted(found["probabilities"].items(), key=lambda one: -one[1])
        PlainProgress().table("", [(label, f"{chance:.2%}") for label, chance in chances], ("label", "probability"))
        _show_rows([("label", found["label"]) if found["label"] is not None else ("labels", ", ".join(found["labels"]) or "none")])
        return
    for piece in endpoints.query(name, prompt, max_tokens, model=model, temperature=temperature, chat=chat):
        print(piece, end="", flush=True)
    print()


@app.command()
def explain(model: Annotated[str, typer.Argument(metavar="RUN", help="A run by name or path, or a folder that transformers loads.",
                                                 autocompletion=_names)],
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

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")         # else DeepSpeed, which transformers looks for, warns
    if output.exists() and not force and not as_json:
        raise InputError("there is such a file already", where=str(output), remedy="give another --output, or --force")
    found = explained(model, sys.stdin.read() if text == "-" else text, target=target, steps=steps, storage=_storage())
    if as_json:
        _print_json({**vars(found), "tokens": [vars(one) for one in found.tokens], "gap": found.gap})
        return
    write_page(found, output)
    PlainProgress().table("", [(repr(one.text), "" if one.surprisal is None else f"{one.surprisal:.2f}", f"{one.attribution:+.3f}")
                               for one in found.tokens], ("token", "bits", "nats for the target"))
    _show_rows([("target", f"{found.target!r}, {found.probability:.2%}"), ("page", str(output))])
    if not found.complete:
        _error(f"the attributions miss {found.gap:+.3f} of {found.added:+.3f} nats; raise --steps")


@app.command()
def dashboard(names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Runs or sweeps. Default: all.",
                                                                autocompletion=_names)] = None,
              port: Annotated[int | None, typer.Option(help="Default: a free one.")] = None) -> None:
    """Serve TensorBoard: curves, a sweep's trials side by side.

    Example: distlm dashboard my-sweep
    """
    from distlm import dashboard as boards
    from distlm import jobs

    storage = _storage()
    paths = [jobs.locate(name, storage).folder for name in names] if names else boards.all_of(storage)
    signal.signal(signal.SIGTERM, _interrupt)
    with boards.serve(paths, port) as url:
        print(f"TensorBoard {url}  (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


Corpus = Annotated[str, typer.Argument(metavar="NAME", help="A corpus by name or folder.", autocompletion=_names)]


@corpus_app.command("inspect")
def corpus_inspect(name: Corpus, ids: Annotated[list[str] | None, typer.Option("--id", help="Show the document of this id.")] = None,
                   find: Annotated[str | None, typer.Option(help="Search the windows for a text.")] = None,
                   windows: Annotated[int, typer.Option(min=0, help="Show so many decoded windows.")] = 0,
                   first: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
                   split: Annotated[str, typer.Option(help="Of this split: train, val, or test where there is one.")] = "train",
                   limit: Annotated[int, typer.Option(min=1, help="Show no more places than that.")] = 10) -> None:
    """Show what a corpus holds: a summary, documents by id, windows, or where a text stands.

    Example: distlm corpus inspect my-corpus --find "import os"
    """
    from distlm.corpus import inspect

    path = _corpus(name)
    for document in inspect.documents(path, ids) if ids else ():
        _show_rows([("id", document.id or document.hash), *([("part", str(document.part))] if document.part else []),
                    ("source", f"{document.source}, record {document.record}"),
                    ("split", document.split), ("size", f"{document.bytes:,} bytes, {document.tokens:,} tokens"),
                    *((key, _shown(value)) for key, value in document.meta.items()),
                    *([("reasons", ", ".join(document.reasons))] if document.reasons else [])])
        print((document.shown or document.text) if document.whole else f"{document.text}\n[its end fills no window]")
    for window in inspect.windows(path, split, first, windows) if windows else ():
        print(f"--- {window.split} window {window.number:,}, documents begin at {window.starts}\n{window.shown or window.text}"
              + (f"\n[{window.padding:,} tokens of padding]" if window.padding else ""))
    if find is not None:
        found = inspect.find(path, find, limit)
        for match in found:
            print(f"{match.split} window {match.window:,}: {match.excerpt}")
        if not found:
            print(f"no window holds {find!r}")
    if not ids and not windows and find is None:
        rows = inspect.summary(path)
        width = max(len(what) for what, _ in rows)
        for what, value in rows:
            print(f"{what:<{width}}  {value}")
        if (path / "report.html").exists():
            print(f"\n{path / 'report.html'} shows more")


@corpus_app.command("verify")
def corpus_verify(name: Corpus) -> None:
    """Check every checksum of a corpus, and that its accounts balance.

    Example: distlm corpus verify my-corpus
    """
    from distlm.corpus.verify import verify

    manifest = verify(_corpus(name))
    shards = [shard for one in manifest.splits.values() for shard in one.shards]
    others = f"{len(manifest.checksums):,} other files are" if manifest.checksums else "the tokenizer are"
    print(f"{manifest.name}: {len(shards):,} shards of {sum(shard.bytes for shard in shards):,} bytes and {others} whole; "
          f"{len(manifest.data['steps'])} steps balance")
    if not manifest.checksums:
        print("an earlier distlm made it, without checksums of the manifest, the report and the lists beside the shards: prepare it again "
              "to have them checked too")


@corpus_app.command("diff")
def corpus_diff(a: Corpus, b: Annotated[str, typer.Argument(metavar="OTHER", help="The other one.", autocompletion=_names)]) -> None:
    """Show what differs between two corpora, reasons first.

    Example: distlm corpus diff corpus-1 corpus-2
    """
    from distlm.corpus.diff import diff
    from distlm.progress import PlainProgress

    differences = diff(_corpus(a), _corpus(b))
    rows = differences.rows()
    if rows:
        PlainProgress().table("", list(rows), ("part", "key", Path(a).name, Path(b).name))
    print("the windows are the same: training on either is the same" if differences.same_windows else "the windows differ")


ClusterFile = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A local cluster's file, or one of `ray up`.")]


@cluster_app.command("up")
def cluster_up(file: ClusterFile = None, yes: Yes = False) -> None:
    """Start a cluster: on this machine, or in a cloud as the file says.

    Example: distlm cluster up
    """
    from distlm import cluster, clusterfile, head

    config = clusterfile.read(file) if file else head.LocalCluster()
    if isinstance(config, clusterfile.RayUpFile):
        _show_rows(config.rows())
        if not yes:
            _confirm("These machines cost money. Start them?")
        config.up()
        return
    signal.signal(signal.SIGTERM, _interrupt)
    up, fresh = head.up(config, _storage())
    print(f"cluster {up.name} {'is up' if fresh else 'was up already'}: {up.cpus} logical CPUs at {up.address}\n"
          f"dashboard {cluster.shown(up.dashboard_url, up.token_file)}\n"
          f"for Ray's own tools: export RAY_ADDRESS={up.dashboard_url} RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={up.token_file}\n"
          f"`distlm cluster down{'' if up.name == 'local' else ' --name ' + up.name}` ends it")


@cluster_app.command("down")
def cluster_down(file: ClusterFile = None, name: Annotated[str, typer.Option(help="A local cluster by name.")] = "local",
                 yes: Yes = False, force: Annotated[bool, typer.Option("--force", help="Forget one whose machine is gone.")] = False
                 ) -> None:
    """End a cluster that `up` started, and no other.

    Example: distlm cluster down
    """
    from distlm import clusterfile, head, stopping

    config = clusterfile.read(file) if file else clusterfile.named(name)
    if isinstance(config, clusterfile.RayUpFile):
        _show_rows(config.rows())
        if not yes:
            _confirm("Terminate these machines?")
        config.down()
        return
    found = [one for one in head.recorded(_storage()) if one.name == config.name]
    if not found:
        print(f"cluster {config.name} is not up")
        return
    if force and not found[0].here():
        head.forget(found[0])
        print(f"the record of cluster {config.name} was removed; its processes on {found[0].host} were not reached")
        return
    ending = stopping.in_cluster(found[0], _storage()) if found[0].here() else []
    others = stopping.others_in_cluster(found[0], ending) if found[0].alive() else []
    if (ending or others) and found[0].alive() and not yes:
        _confirm(f"{', '.join([*(job.name for job in ending), *others])} would end with it. Go on?")
    for job in ending:
        stopping.end_with_cluster(job)
    print(f"cluster {config.name} is down: {head.down(found[0])} processes ended")
    for job in ending:
        stopping.ended_with_cluster(job)
        print(f"{job.kind} {job.name} ended with it")
    for other in others:
        print(f"{other} ended with it")


@cluster_app.command("status")
def cluster_status(as_json: Json = False) -> None:
    """Show the cluster that jobs would run in.

    Example: distlm cluster status
    """
    from distlm import cluster

    now = cluster.status(cluster.require(_storage()))
    if as_json:
        _print_json({"name": now.cluster.name, "address": now.cluster.address, "dashboard": now.cluster.dashboard_url, "nodes": now.nodes,
                     "resources": now.resources, "jobs": now.jobs, "applications": now.applications})
        return
    print(f"cluster {now.cluster.name} is up")
    _show_rows([("address", now.cluster.address), ("dashboard", now.cluster.dashboard_url), ("nodes", str(now.nodes)),
                *((f"{name}s", f"{used:g} of {total:g} in use") for name, (used, total) in now.resources.items()),
                ("jobs", ", ".join(now.jobs) or "none"),
                ("endpoints", ", ".join(f"{name} ({state})" for name, state in now.applications.items()) or "none")])


def _storage() -> "Storage":
    from distlm.storage import Storage

    return Storage.find()


def _confirm(question: str) -> None:
    """Go on after a yes. Raises InputError where nobody can answer, Abort after a no or Ctrl-C."""
    try:
        if sys.stdin is None:
            raise EOFError
        typer.confirm(question, abort=True)
    except (typer.Abort, EOFError) as error:
        if not isinstance(error.__context__ or error, EOFError):
            raise
        print()
        raise InputError(f"{question} Nobody answers, standard input has ended", remedy="--yes goes on without asking") from None


def _interrupt(*_: Any) -> None:
    """SIGTERM, with which Ray and schedulers end a job, stops it as Ctrl-C does."""
    raise KeyboardInterrupt


def _hang_up(*_: Any) -> None:
    """A terminal that is closed stops a job as Ctrl-C does, also where a part of it handles that in its own way; where that is ignored, as
    in the background of a script, as SIGTERM does."""
    signal.raise_signal(signal.SIGTERM if signal.getsignal(signal.SIGINT) == signal.SIG_IGN else signal.SIGINT)


def _show(lines: Iterator[str]) -> None:
    """Records as bars and tables, everything else as it is."""
    from distlm.progress import PlainProgress, RichProgress, parse

    with RichProgress() if sys.stdout.isatty() else PlainProgress() as progress:
        for line in lines:
            record = parse(line)
            if record:
                progress.show(record)
            elif not PREAMBLE.search(line):
                print(line, flush=True)


def _follow(submission: "Submission") -> None:
    """Show a submitted job to its end, and end as it did."""
    from distlm import jobs, logs
    from distlm.runs import RunFolder

    name = submission.folder.name
    try:
        _show(logs.follow(submission))
    except KeyboardInterrupt:
        _say(f"\n{name} goes on: `distlm logs -f {name}` follows it, `distlm stop {name}` ends it")
        raise typer.Exit(130) from None
    job = jobs.reconcile(jobs.read(RunFolder(submission.folder)))
    if job.state != "succeeded" and not (job.kind == "serve" and job.state == "running"):     # an endpoint stays
        code = (jobs.ray_job(submission) or {}).get("driver_exit_code")
        _error(f"{name} {'was' if job.state == 'stopped' else 'has'} {job.state} ({job.cause}){': ' if job.message else ''}{job.message}")
        raise typer.Exit(code if code in (2, 4, 130) else 3)


def _show_rows(rows: list[tuple[str, str]]) -> None:
    for key, value in rows:
        print(f"  {key:<10} {value}")


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2))


def _shown(value: Any) -> str:
    import json

    return value if isinstance(value, str) else json.dumps(value)


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


def _corpus(name: str) -> Path:
    from distlm.train.recipe import find_corpus

    return find_corpus(name, _storage())


def _dashboard() -> str:
    from distlm import cluster

    try:
        found = cluster.find(_storage())
    except DistlmError:
        return ""
    return found.dashboard_url if found else ""
