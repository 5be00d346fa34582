"""MB/s per core of near-duplicates, MinHash to clusters, in one process: on made-up English-like prose and on the standard library.

    python benchmarks/corpus/dedup.py                 # 24 MB of each
    python benchmarks/corpus/dedup.py --quick         # 2 MB of each: does it work
    python benchmarks/corpus/dedup.py --profile       # and where the time goes

Beside it, on the same documents, datatrove's MinHash stages where `pip install datatrove[processing]` has put them. The floor is what
Data-Juicer's authors report for their Ray deduplicator, per core; it is not measured here. datatrove splits words by its English
tokenizer, and drops what meets without comparing it. Every fifth document of the prose is an earlier one, with up to a twentieth of its
words changed.
"""

import argparse
import cProfile
import importlib.util
import os
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["RAYON_NUM_THREADS"] = "1"          # before numpy and rensa start theirs

import pyarrow as pa
import xxhash
from texts import prose, standard_library

from distlm.corpus.fuzzy import min_similarity, near_duplicates, probability
from distlm.corpus.partitions import BATCH_ROWS
from distlm.spec.curate import Fuzzy

FLOOR = "0.39 to 0.51"
PARTITION_BYTES = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=24.0, help="text of each kind")
    parser.add_argument("--rounds", type=int, default=3, help="times that the sides run in turn")
    parser.add_argument("--quick", action="store_true", help="one round on 2 MB")
    parser.add_argument("--profile", action="store_true", help="show the functions that take the most time")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.rounds = 2.0, 1
    rules = Fuzzy()
    print(f"{rules.bands} bands of {rules.rows} rows, shingles of {rules.ngram_words} words, from a similarity of "
          f"{min_similarity(rules):.3f} on; a pair of 0.8 is met with {probability(0.8, rules.bands, rules.rows):.3f}; CPU time")
    print(f"{'':16} {'':22} {'MB/s':>6} {'min':>6} {'max':>6}   documents  dropped  largest cluster")
    for kind, texts in {"prose": prose, "standard library": standard_library}.items():
        compare(kind, texts(int(options.megabytes * 1e6)), options.rounds, rules)
        if options.profile:
            profile(texts(int(options.megabytes * 1e6)), rules)
    print(f"{'':16} {'Data-Juicer, reported':22} {FLOOR}")


def compare(kind: str, texts: list[str], rounds: int, rules: Fuzzy) -> None:
    """Print a line for each side."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    sides: dict[str, Callable[[list[str], Fuzzy], tuple[int, str]]] = {"distlm": distlm_side}
    if importlib.util.find_spec("datatrove") is None:
        print("datatrove is not installed: no line for it", file=sys.stderr)
    elif int(xxhash.VERSION.split(".")[0]) > 3:            # which hashes no str, as datatrove 0.10.1 has it do
        print(f"datatrove needs xxhash below 4, and {xxhash.VERSION} comes first on the path: no line for it; "
              "pip install 'xxhash<4' where datatrove is", file=sys.stderr)
    else:
        sides["datatrove"] = datatrove_side
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    said = {}
    for _ in range(rounds):
        for side, function in sides.items():
            spent, said[side] = function(texts, rules)
            speeds[side].append(size / (spent / 1e9))
    for side, values in speeds.items():
        print(f"{kind:16} {side:22} {statistics.median(values):6.2f} {min(values):6.2f} {max(values):6.2f}   {len(texts):9,}  {said[side]}")


def distlm_side(texts: list[str], rules: Fuzzy) -> tuple[int, str]:
    """(nanoseconds of CPU, what was found) from partitions on disk to the rows to drop."""
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder:
        paths = write_partitions(texts, Path(folder))
        start = time.process_time_ns()
        found = near_duplicates(paths, rules, Path(folder), in_turn)
        spent = time.process_time_ns() - start
    return spent, f"{sum(len(dropped.rows) for dropped in found.dropped):7,}  {found.largest}"


def datatrove_side(texts: list[str], rules: Fuzzy) -> tuple[int, str]:
    """The same of datatrove: signatures, buckets, clusters and the filter that counts what goes, one task each."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.logging import logger

    logger.remove()
    config = MinhashConfig(hash_config=HashConfig(precision=64), n_grams=rules.ngram_words, num_buckets=rules.bands,
                           hashes_per_bucket=rules.rows)
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder:
        MinhashDedupSignature(f"{folder}/first", config).run(iter(documents[:4]), 0, 1)   # loads its word tokenizer
        start = time.process_time_ns()
        MinhashDedupSignature(f"{folder}/signatures", config).run(iter(documents), 0, 1)
        for bucket in range(rules.bands):
            MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=config).run(None, bucket, rules.bands)
        MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config).run(None, 0, 1)
        kept = sum(1 for _ in MinhashDedupFilter(f"{folder}/remove").run(iter(documents), 0, 1))
        spent = time.process_time_ns() - start
    return spent, f"{len(texts) - kept:7,}  (candidates are not confirmed)"


def profile(texts: list[str], rules: Fuzzy) -> None:
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder:
        paths = write_partitions(texts, Path(folder))
        profiler = cProfile.Profile()
        profiler.runcall(near_duplicates, paths, rules, Path(folder), in_turn)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(14)


def in_turn(function: Callable[[Any], Any], tasks: Sequence[Any]) -> Iterable[tuple[int, Any]]:
    return ((i, function(task)) for i, task in enumerate(tasks))


def write_partitions(texts: list[str], folder: Path) -> list[Path]:
    """As `distlm.corpus.dedup` makes them."""
    size = sum(map(len, texts))
    number = max(1, round(size / PARTITION_BYTES))
    paths = [folder / f"sorted-{i:04d}.arrow" for i in range(number)]
    for i, path in enumerate(paths):
        part = texts[len(texts) * i // number:len(texts) * (i + 1) // number]
        table = pa.table({"text": pa.array(part, pa.string()), "turns": pa.array([""] * len(part), pa.string())})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=BATCH_ROWS)
    return paths


if __name__ == "__main__":
    main()
