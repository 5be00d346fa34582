"""Which package of the standard library is a module from, by its source? `distlm run` of jobs/classify-stdlib.yaml beside TF-IDF with
logistic regression, over the same folds: accuracy, macro F1, macro ROC AUC (one against the rest) and seconds.

    python benchmarks/classify.py --write stdlib-labels.jsonl      # the records alone, for the job by itself
    python benchmarks/classify.py --folds 5
    python benchmarks/classify.py --folds 5 --only 0 --set steps.train.duration.epochs=1        # does it work

Packages with fewer than 20 modules are left out, as are tests and modules of less than 200 characters. A module often names its own
package, so that words alone tell most of them apart: this is a check of the whole way, not a hard task. Both sides learn from the same
modules, the model from the first 256 tokens of each.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from typing import Any

JOB = Path(__file__).parent.parent / "jobs" / "classify-stdlib.yaml"
LEAST_MODULES, LEAST_CHARS = 20, 200
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
Records = list[dict[str, Any]]
COLUMNS = ("accuracy", "f1_macro", "roc_auc", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, help="write the records there, and nothing else")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", type=int, nargs="+", help="of these, from 0, no others")
    parser.add_argument("--side", choices=[*SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], help="another value of the job, as of `distlm run`")
    options = parser.parse_args()
    found = records()
    if options.write:
        options.write.write_text("".join(json.dumps(record) + "\n" for record in found))
        return
    labels = sorted({record["label"] for record in found})
    if options.side:
        train, held_out = ([record for record in found if (record["fold"] % options.folds == options.only[0]) == out] for out in (0, 1))
        print(json.dumps(SIDES[options.side](train, held_out, labels, options.set)))
        return
    print(f"{len(found):,} modules of {len(labels)} packages; {options.folds} folds by the hash of the text")
    print(f"{'fold':>4}  {'':18} " + " ".join(f"{name:>9}" for name in COLUMNS))
    totals: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for fold in options.only or range(options.folds):
        for name in SIDES:
            scores = measure(name, fold, options)
            totals[name].append(scores)
            print(f"{fold:4}  {name:18} " + " ".join(f"{scores[key]:9.4f}" for key in COLUMNS), flush=True)
    for name, each in totals.items():
        print(f"mean  {name:18} " + " ".join(f"{sum(scores[key] for scores in each) / len(each):9.4f}" for key in COLUMNS))


def measure(side: str, fold: int, options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own."""
    done = subprocess.run([sys.executable, __file__, f"--folds={options.folds}", f"--only={fold}", f"--side={side}",
                           *(f"--set={value}" for value in options.set)], text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    scores: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return scores


def records() -> Records:
    """Modules of the large packages, each text once; `fold` is a hash of it."""
    root, found = Path(sysconfig.get_path("stdlib")), dict[str, dict[str, Any]]()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if len(parts) > 1 and not SKIPPED & set(parts):
            text = path.read_bytes().decode("utf-8", "replace")
            if len(text) >= LEAST_CHARS:
                fold = int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big")
                found.setdefault(text, {"id": "/".join(parts), "text": text, "label": parts[0], "fold": fold})
    counts = Counter(record["label"] for record in found.values())
    return [record for record in found.values() if counts[record["label"]] >= LEAST_MODULES]


def baseline(train: Records, held_out: Records, labels: list[str], settings: list[str]) -> dict[str, Any]:
    """Words of the whole text, and pairs of them."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from distlm.train.scores import single_label

    started = time.perf_counter()
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=200_000),
                          LogisticRegression(C=10, max_iter=1000))
    model.fit([record["text"] for record in train], [record["label"] for record in train])
    chances = model.predict_log_proba([record["text"] for record in held_out])
    assert list(model.classes_) == labels
    import numpy as np

    truth = np.array([labels.index(record["label"]) for record in held_out])
    return {**single_label(truth, chances, labels), "seconds": time.perf_counter() - started}


def run_distlm(train: Records, held_out: Records, labels: list[str], settings: list[str]) -> dict[str, Any]:
    """The job file as it stands, over the two parts: the scores of its last evaluation, and the seconds of preparation and training."""
    import distlm
    from distlm.progress import Progress

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder:
        for name, part in (("train.jsonl", train), ("val.jsonl", held_out)):
            (Path(folder) / name).write_text("".join(json.dumps(record) + "\n" for record in part))
        os.chdir(folder)
        sources = [{"path": "train.jsonl", "split": "train"}, {"path": "val.jsonl", "split": "val"}]
        outputs = distlm.run(JOB, overrides=[f"steps.prepare.sources={json.dumps(sources)}", *settings], storage=folder,
                             progress=Progress())
        last = [record for record in distlm.load_run(outputs["train"], storage=folder).read_metrics() if "accuracy" in record][-1]
        told = json.loads((Path(outputs["prepare"]) / "manifest.json").read_text())["splits"]["val"]
        os.chdir("/")
        assert told["documents"] == len(held_out), "a held-out module is a duplicate, or was rejected"
    return {**last, "seconds": time.perf_counter() - started}


SIDES = {"TF-IDF, logistic": baseline, "distlm run": run_distlm}

if __name__ == "__main__":
    main()
