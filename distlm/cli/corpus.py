"""`distlm corpus`."""

from pathlib import Path
from typing import Annotated

import typer

from distlm.cli.options import names
from distlm.cli.terminal import show_rows, shown
from distlm.storage import Storage

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into a corpus, check it, compare two.")
Corpus = Annotated[str, typer.Argument(metavar="NAME", help="A corpus by name or folder.", autocompletion=names)]


@app.command("inspect")
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
        show_rows([("id", document.id or document.hash), *([("part", str(document.part))] if document.part else []),
                    ("source", f"{document.source}, record {document.record}"),
                    ("split", document.split), ("size", f"{document.bytes:,} bytes, {document.tokens:,} tokens"),
                    *((key, shown(value)) for key, value in document.meta.items()),
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


@app.command("verify")
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


@app.command("diff")
def corpus_diff(a: Corpus, b: Annotated[str, typer.Argument(metavar="OTHER", help="The other one.", autocompletion=names)]) -> None:
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


def _corpus(name: str) -> Path:
    from distlm.train.recipe import find_corpus

    return find_corpus(name, Storage.find())
