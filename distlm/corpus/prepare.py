"""`kind: prepare`: from raw text to a corpus.

    files ──curate──▶ documents ──make_shards──▶ tokens and shards on a scratch folder ──▶ the corpus

Each arrow is a row of functions over files or partitions that Ray Data runs in parallel; what stands between is on a scratch folder in
the corpus folder. What the corpus will hold is made there too and moved when it is whole; the manifest is written last: a folder without
one is no corpus.
"""

import json
from typing import Any

from distlm import __version__
from distlm.corpus.attempts import MADE, clear, take_back
from distlm.corpus.curate import Curated, curate
from distlm.corpus.documents import check
from distlm.corpus.identity import is_complete, parameters
from distlm.corpus.job import Job
from distlm.corpus.listing import count_sources
from distlm.corpus.manifest import manifest_of, outputs, read_manifest, write_manifest
from distlm.corpus.report import write_report
from distlm.corpus.shards import Sharded, make_shards
from distlm.corpus.spread import default_workers
from distlm.errors import CorpusError, InputError
from distlm.progress import Progress
from distlm.runs import RunFolder
from distlm.spec import PrepareSpec
from distlm.storage import Storage, write_atomic, writing

FUZZY = ("fuzzy", "fuzzy_stripped", "fuzzy_shortened")
"""The looks for near-duplicates: at whole documents, and again at what is left of them."""


def prepare(spec: PrepareSpec, folder: RunFolder, storage: Storage, progress: Progress) -> dict[str, Any]:
    """Make the corpus in `folder`. A complete one of the same files and rules is kept. Ray is running.

    Raises InputError before any work, CorpusError for text that cannot become a corpus, StorageError.
    """
    files, evaluations = check(spec)
    rules = parameters(spec, evaluations)
    if is_complete(spec, rules, folder.path, files):
        progress.note("the corpus is complete, and its sources are as they were: nothing to do")
        clear(folder.path, ".scratch-*")
        return outputs(read_manifest(folder.path))
    job = Job(spec, rules, files, folder.path, progress, spec.workers or default_workers())
    take_back(folder.path, job.scratch)
    clear(folder.path, *MADE, but=job.scratch)
    try:
        job.made()
        curated = curate(job, evaluations)
        sharded = make_shards(job, curated)
        commit(job, curated, sharded)
    except (CorpusError, InputError):                      # it would fail again; the samples of what was rejected may say why
        clear(folder.path, *MADE[:-1], ".scratch-*")
        raise
    except BaseException:                                  # what is done is done: the next attempt goes on with it
        take_back(folder.path, job.scratch)
        clear(folder.path, *MADE[:-1])
        raise
    clear(folder.path, ".scratch-*")
    return outputs(read_manifest(folder.path))


def commit(job: Job, curated: Curated, sharded: Sharded) -> None:
    """Move what is whole to its place, and write the manifest. Raises StorageError, CorpusError where the books do not balance."""
    spec, rules, folder = job.spec, job.rules, job.folder
    job.inputs.write(folder, sharded.lists)
    counts = count_sources(sharded.lists, len(spec.sources), curated.rule.names)
    write_atomic(folder / "duplicates.jsonl", "".join(json.dumps(cluster) + "\n" for cluster in curated.clusters))
    tokenizer = sharded.vocabulary.data()
    with writing(folder):
        for name in ("tokenizer", *curated.rule.names):
            (job.scratch / name).rename(folder / name)
    of = {"read": {}, "clean": rules["clean"], "sample": {}, "filter": rules["filter"],
          **dict.fromkeys(("decontaminate", "decontaminate_stripped", "decontaminate_shortened"), rules["decontaminate"] or {}),
          "dedup": {"exact": rules["dedup"]["exact"]}, **dict.fromkeys(FUZZY, rules["dedup"]["fuzzy"] or {}),
          "boilerplate": rules["clean"]["boilerplate"] or {},
          "dedup_stripped": {"exact": True}, "dedup_shortened": {"exact": True},
          "paragraphs": {"min_chars": rules["dedup"]["paragraphs"]}, "split": rules["split"],
          "tokenize": rules["tokenizer"] | {"sampled": sharded.vocabulary.sampled}}
    data = {
        "name": spec.name, "context": spec.context, "dtype": sharded.vocabulary.dtype, "seed": spec.seed, "parameters": rules,
        "sources": [{**source, "splits": counts[i]} for i, source in job.inputs.sources],
        "steps": [step.data(of[step.name]) for step in job.books.steps], "tokenizer": tokenizer,
        "split": {"rule": curated.rule.described(spec.conversations is not None), **rules["split"],
                  "held_out": curated.rule.held_out.hex()},
        "splits": sharded.splits, **job.figures, "code": __version__}
    write_report(manifest_of(folder, data))
    write_manifest(folder, data)
