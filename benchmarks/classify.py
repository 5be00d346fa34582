"""Which package of the standard library is a module from, by its source? A cross-validation of jobs/classify-stdlib.yaml, `distlm run` of a
sweep with folds, beside TF-IDF with logistic regression over the same folds: accuracy, macro F1, macro ROC AUC (one against the rest).

    python benchmarks/classify.py --write stdlib-labels.jsonl      # the records alone, for the job by itself
    python benchmarks/classify.py --folds 5
    python benchmarks/classify.py --folds 2 --set duration.epochs=2                             # does it work

Packages with fewer than 20 modules are left out, as are tests and modules of less than 200 characters. A module often names its own
package, so that words alone tell most of them apart: this is a check of the whole way, not a hard task. Both sides learn from the same
modules, the model from the first 256 tokens of each. Neither sees what a fold holds out, but for the tokenizer of the corpus, which is made
once, without labels.
"""

import argparse
import json
import os
import statistics
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

JOB = Path(__file__).parent.parent / "jobs" / "classify-stdlib.yaml"
LEAST_MODULES, LEAST_CHARS = 20, 200
SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
Records = list[dict[str, Any]]
COLUMNS = ("accuracy", "f1_macro", "roc_auc")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", type=Path, help="write the records there, and nothing else")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="another value of the training spec")
    options = parser.parse_args()
    found = records()
    if options.write:
        write(options.write, found)
        return
    print(f"{len(found):,} modules of {len({record['label'] for record in found})} packages; {options.folds} folds by the hash of the text")
    sides = measure(found, options)
    print(f"{'fold':>17}  {'':18} " + " ".join(f"{name:>15}" for name in COLUMNS))
    for fold in range(options.folds):
        for name, (scores, _) in sides.items():
            print(f"{fold:17}  {name:18} " + " ".join(f"{scores[key][fold]:15.4f}" for key in COLUMNS))
    for name, (scores, seconds) in sides.items():
        means = (f"{statistics.fmean(scores[key]):.4f} ± {statistics.stdev(scores[key]):.4f}" for key in COLUMNS)
        print(f"{'mean ± deviation':>17}  {name:18} " + " ".join(f"{text:>15}" for text in means) + f"   {seconds:.1f} s in all")


def write(path: Path, found: Records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in found))


def measure(found: Records, options: argparse.Namespace) -> dict[str, tuple[dict[str, list[float]], float]]:
    """(each metric in each fold, seconds of all) of both sides."""
    import distlm
    from distlm.progress import Progress

    with tempfile.TemporaryDirectory(prefix="distlm-bench-") as folder:
        write(Path(folder) / "stdlib-labels.jsonl", found)
        os.chdir(folder)
        steps: Any = distlm.resolve(JOB, [f"steps.train.{text}" for text in options.set]).spec.steps       # type: ignore[union-attr]
        train = {key: value for key, value in steps["train"].items() if key != "name"}
        tune = {"kind": "tune", "train": train, "folds": options.folds, "metric": "accuracy", "concurrent": 1}
        started = time.perf_counter()
        made = distlm.run({"kind": "pipeline", "name": "folds", "steps": {"prepare": steps["prepare"], "tune": tune}}, storage=folder,
                          progress=Progress())
        seconds = time.perf_counter() - started
        [point] = json.loads((Path(made["tune"]) / "result.json").read_text())["points"]
        ours = {key: point["metrics"][key]["folds"] for key in COLUMNS}
        os.chdir("/")
        return {"distlm run": (ours, seconds), "TF-IDF, logistic": baseline(found, Path(made["prepare"]), options.folds)}


def records() -> Records:
    """Modules of the large packages, each text once."""
    root, found = Path(sysconfig.get_path("stdlib")), dict[str, dict[str, Any]]()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if len(parts) > 1 and not SKIPPED & set(parts):
            text = path.read_bytes().decode("utf-8", "replace")
            if len(text) >= LEAST_CHARS:
                found.setdefault(text, {"id": "/".join(parts), "text": text, "label": parts[0]})
    counts = Counter(record["label"] for record in found.values())
    return [record for record in found.values() if counts[record["label"]] >= LEAST_MODULES]


def baseline(found: Records, corpus: Path, folds: int) -> tuple[dict[str, list[float]], float]:
    """Words of the whole text, and pairs of them, over the documents of the corpus and its folds."""
    import numpy as np
    import pyarrow.parquet as pq
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    from distlm.corpus.folds import fold_of
    from distlm.train.scores import single_label

    kept = pq.read_table(corpus / "documents.parquet", columns=["record", "hash"]).to_pylist()
    labels, started = sorted({record["label"] for record in found}), time.perf_counter()
    scores: dict[str, list[float]] = {key: [] for key in COLUMNS}
    for fold in range(folds):
        parts: tuple[Records, Records] = ([], [])
        for row in kept:
            parts[fold_of(row["hash"], folds) == fold].append(found[row["record"]])
        model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, max_features=200_000),
                              LogisticRegression(C=10, max_iter=1000))
        model.fit([record["text"] for record in parts[0]], [record["label"] for record in parts[0]])
        assert list(model.classes_) == labels
        truth = np.array([labels.index(record["label"]) for record in parts[1]])
        told = single_label(truth, model.predict_log_proba([record["text"] for record in parts[1]]), labels)
        for key in COLUMNS:
            scores[key].append(told[key])
    return scores, time.perf_counter() - started


if __name__ == "__main__":
    main()
