"""The command line: every verb parses, calls one library function, prints. Libraries are imported inside, so that --help is quick."""

import os
import sys
from typing import Annotated

import typer

from distlm.cli import cluster, corpus, jobs
from distlm.cli.terminal import report_error
from distlm.errors import DistlmError

app = typer.Typer(name="distlm", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]},
                  help="From raw text to a served language model: one YAML spec per job.")
app.add_typer(jobs.app)
app.add_typer(corpus.app, name="corpus")
app.add_typer(cluster.app, name="cluster")


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
        report_error("interrupted")
        return 130
    except KeyboardInterrupt:
        report_error("interrupted")
        return 130
    except (BrokenPipeError, SystemExit) as error:         # typer makes the second of the first
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        return 0                                           # the reader of the pipe, `head` for one, has seen enough
    except DistlmError as error:
        if debug:
            raise
        report_error(str(error))
        return error.exit_code
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message:                                        # the command line itself is wrong
            context = getattr(error, "ctx", None)
            report_error(f"{message().rstrip('.')}; `{context.command_path if context else 'distlm'} --help` shows the usage")
            return 2
        if debug:
            raise
        report_error(f"{type(error).__name__}: {error}".splitlines()[0] + "; `--debug` shows where")
        return 3


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
          debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; also DISTLM_DEBUG=1.")] = False) -> None:
    if version:
        import distlm

        print(distlm.__version__)
        raise typer.Exit
