"""MB/s per core of cleaning and the quality filters, in one process: on made-up English-like prose and on the standard library.

    python benchmarks/corpus/filters.py               # 24 MB of each
    python benchmarks/corpus/filters.py --quick       # 2 MB of each: does it work
    python benchmarks/corpus/filters.py --profile     # and where the time goes

Every document passes every rule of Gopher and FineWeb, as with `mode: annotate`: a text that is rejected early would flatter both sides.
Beside it, on the same documents, datatrove's GopherQualityFilter, GopherRepetitionFilter and FineWebQualityFilter where `pip install
datatrove[processing]` has put them; it splits words by its English tokenizer. The floor is that of NeMo Curator's own CI, not measured
here.
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable

from texts import prose, standard_library

from distlm.corpus.filters import Filters
from distlm.spec.curate import Clean, Filter
from distlm.text.clean import clean

FLOOR = "0.63"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=24.0, help="text of each kind")
    parser.add_argument("--rounds", type=int, default=3, help="times that the sides run in turn")
    parser.add_argument("--quick", action="store_true", help="one round on 2 MB")
    parser.add_argument("--profile", action="store_true", help="show the functions that take the most time")
    options = parser.parse_args()
    if options.quick:
        options.megabytes, options.rounds = 2.0, 1
    sides: dict[str, Callable[[list[str]], int]] = {"distlm": distlm_side}
    try:
        import datatrove  # noqa: F401

        sides["datatrove"] = datatrove_side
    except ImportError:
        print("datatrove is not installed: no line for it", file=sys.stderr)
    print(f"{'':16} {'':22} {'MB/s':>6} {'min':>6} {'max':>6}   documents  rejected")
    for kind, texts in {"prose": prose, "standard library": standard_library}.items():
        documents = texts(int(options.megabytes * 1e6))
        size = sum(len(text.encode()) for text in documents) / 1e6
        speeds, rejected = {side: list[float]() for side in sides}, Counter[str]()
        for _ in range(options.rounds):
            for side, function in sides.items():
                started = time.process_time()
                rejected[side] = function(documents)
                speeds[side].append(size / (time.process_time() - started))
        for side, found in speeds.items():
            print(f"{kind:16} {side:22} {statistics.median(found):6.2f} {min(found):6.2f} {max(found):6.2f}   {len(documents):9,}  "
                  f"{rejected[side]:8,}")
        if options.profile:
            with cProfile.Profile() as profile:
                distlm_side(documents)
            pstats.Stats(profile).sort_stats("tottime").print_stats(15)
    print(f"{'':16} {'NeMo Curator, CI floor':22} {FLOOR}")


def distlm_side(texts: list[str]) -> int:
    """How many documents a rule rejects."""
    rules, filters = Clean(), Filters(Filter(rules=("gopher_quality", "gopher_repetition", "fineweb"), mode="annotate"))
    return sum(bool(filters.reasons(clean(text, rules).text)) for text in texts)


def datatrove_side(texts: list[str]) -> int:
    from datatrove.data import Document
    from datatrove.pipeline.filters import FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter

    filters = [GopherQualityFilter(), GopherRepetitionFilter(), FineWebQualityFilter(exclusion_writer=None)]
    rejected = 0
    for i, text in enumerate(texts):
        document = Document(text=text, id=str(i))
        rejected += sum(one.filter(document) is not True for one in filters) > 0
    return rejected


if __name__ == "__main__":
    main()
