"""`report.html`: a corpus on one page that needs no network and no script.

    write_report(storage.corpus("stdlib"))                 # the path of the page

It is made from the manifest, documents.parquet and the samples of rejects and duplicates alone, and equal corpora have equal pages.
Everything that a corpus holds is escaped: its text is anyone's.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distlm.corpus.manifest import Manifest, read_manifest
from distlm.errors import CorpusError
from distlm.storage import write_atomic

FILE = "report.html"
MAX_ROWS = 12
"""Of a histogram of endings, languages or sources; the rest is one row more."""
MAX_SAMPLES = 6
SAMPLE_CHARS = 400
KNOWN = {"documents", "format", "name", "context", "dtype", "seed", "parameters", "sources", "steps", "tokenizer", "split", "splits",
         "code", "decontamination", "languages", "files", "inputs", "hash"}
TITLES = {"fuzzy": "Near-duplicates", "fuzzy_stripped": "Near-duplicates without their boilerplate",
          "fuzzy_shortened": "Near-duplicates without repeated paragraphs", "redactions": "Redacted",
          "annotated": "Annotated: these documents were kept", "boilerplate": "Boilerplate lines", "paragraphs": "Repeated paragraphs",
          "pack": "Packing", "conversations": "Loss of conversations", "labels": "Labels"}
ALIKE = {"dedup": "equal", "fuzzy": "nearly equal", "dedup_stripped": "equal without boilerplate",
         "fuzzy_stripped": "nearly equal without boilerplate", "dedup_shortened": "equal without repeated paragraphs",
         "fuzzy_shortened": "nearly equal without repeated paragraphs"}
"""What the documents of a cluster are, by the step that found it."""
LANGUAGE = r'"lang(?:uage)?": ?"(?P<found>[^"]+)"'
ENDING = r"(?P<found>\.[A-Za-z0-9_]{1,12})(?:\.(?:gz|zst|bz2|xz))?$"


@dataclass
class Bar:
    """A row of a bar chart. `width` is a share of the longest, in percent."""

    name: str
    value: int
    width: str = ""
    notes: tuple[str, ...] = ()


@dataclass
class Documents:
    """What documents.parquet says, added up."""

    lengths: Counter[int] = field(default_factory=Counter)
    """By power of two of the bytes."""
    endings: Counter[str] = field(default_factory=Counter)
    programming: Counter[str] = field(default_factory=Counter)
    """Languages of documents of sources with `code: true`."""
    named: Counter[str] = field(default_factory=Counter)
    """Languages that other sources name, by a field that is kept."""


def write_report(corpus: Path | Manifest) -> Path:
    """Write the page into the corpus folder, which may be without its manifest as yet. Raises InputError where there is no complete corpus,
    CorpusError, StorageError."""
    manifest = corpus if isinstance(corpus, Manifest) else read_manifest(corpus)
    documents = _documents(manifest)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("distlm.corpus", "."), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": lambda value: f"{value:,}", "size": _size}
    page = environment.get_template("report.html.j2").render(
        manifest=manifest, data=manifest.data, facts=_facts(manifest), funnel=_funnel(manifest.data["steps"]),
        reasons=_reasons(manifest), documents=documents, lengths=_lengths(documents.lengths) if documents else [],
        endings=_top(documents.endings) if documents else [], programming=_top(documents.programming) if documents else [],
        named=_top(documents.named) if documents else [], languages=_languages(manifest.data), clusters=_clusters(manifest),
        sources=_sources(manifest), decontamination=_decontamination(manifest.data),
        figures=_figures(manifest.data), parameters=json.dumps(manifest.data.get("parameters", {}), indent=2, ensure_ascii=False))
    write_atomic(manifest.path / FILE, page.encode("utf-8", "replace"))
    return manifest.path / FILE


def _facts(manifest: Manifest) -> list[tuple[str, str]]:
    splits = manifest.splits.values()
    documents, size, tokens = (sum(getattr(split, key) for split in splits) for key in ("documents", "bytes", "tokens"))
    return [("documents", f"{documents:,}"), ("of text", _size(size)), ("tokens", f"{tokens:,}"),
            ("bytes per token", f"{size / tokens:.2f}" if tokens else "–"),
            ("windows", f"{sum(split.windows for split in splits):,}"), ("vocabulary", f"{manifest.vocab_size:,}")]


def _funnel(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was there at first, and after each step, with the shares of the largest."""
    if not steps:
        return []
    rows = [{"name": "input", **steps[0]["in"], "lost": 0}]
    rows += [{"name": step["name"], **step["out"], "lost": sum(lost["documents"] for lost in step["rejected"].values())} for step in steps]
    return [{**row, **{f"{unit}_width": _share(row[unit], max(each[unit] for each in rows)) for unit in ("documents", "bytes")}}
            for row in rows]


def _reasons(manifest: Manifest) -> list[dict[str, Any]]:
    """Why documents, and bytes of documents that stay, were taken out: the most frequent first, with samples."""
    rows = [{"step": step["name"], "reason": reason, **lost} for step in manifest.data["steps"]
            for reason, lost in step["rejected"].items()]
    rows.sort(key=lambda row: (-row["documents"], -abs(row["bytes"]), row["step"], row["reason"]))
    most = max((row["documents"] for row in rows), default=0)
    place = _place_of(manifest)
    return [{**row, "width": _share(row["documents"], most),
             "samples": _samples(manifest.path / "rejects" / f"{row['reason']}.jsonl", place)} for row in rows]


def _place_of(manifest: Manifest) -> Callable[[dict[str, Any]], str]:
    """Says where a document stood: its source too where several have one name."""
    counts = Counter(source["name"] for source in manifest.sources)
    among = [f" of {name}" if counts[source["name"]] > 1 else ""
             for name, source in zip(manifest.source_names, manifest.sources, strict=True)]
    return lambda one: f"{one['source']}{among[one['origin']]}, record {one['record']}"


def _samples(path: Path, place: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """The first samples of a reason; `same_as` is the document that was kept in its place."""
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:MAX_SAMPLES] if line]
        return [{"place": place(line), "bytes": line["bytes"], "detail": line.get("detail", ""),
                 "text": str(line.get("text", ""))[:SAMPLE_CHARS], "same_as": place(line["same_as"]) if "same_as" in line else "",
                 "similarity": line.get("similarity")} for line in lines]
    except (ValueError, LookupError, TypeError) as error:
        raise CorpusError(f"the samples cannot be read: {error}", where=str(path), remedy="delete the file, or prepare again") from None


def _clusters(manifest: Manifest) -> list[dict[str, Any]]:
    """Documents that are alike, near-duplicates first, the largest clusters first."""
    path, place = manifest.path / "duplicates.jsonl", _place_of(manifest)
    if not path.is_file():
        return []
    try:
        found = [{**cluster, "alike": ALIKE[cluster["step"]], "members": [{**one, "place": place(one)} for one in cluster["members"]]}
                 for cluster in map(json.loads, path.read_text(encoding="utf-8").splitlines())]
        return sorted(found, key=lambda cluster: (not cluster["step"].startswith("fuzzy"), -cluster["documents"]))
    except (ValueError, LookupError, TypeError) as error:
        raise CorpusError(f"the clusters cannot be read: {error}", where=str(path), remedy="delete the file, or prepare again") from None


def _documents(manifest: Manifest) -> Documents | None:
    """Read a bounded number of rows at a time."""
    path = manifest.path / "documents.parquet"
    code = pa.array([i for i, source in enumerate(manifest.sources) if source.get("code")], pa.int32())
    if not path.is_file():
        return None
    found = Documents()
    try:
        for batch in pq.ParquetFile(path).iter_batches(1 << 16, columns=["origin", "source", "meta", "bytes"]):
            sizes = batch["bytes"].to_numpy()
            bins, numbers = np.unique(np.where(sizes > 0, np.log2(np.maximum(sizes, 1)).astype(np.int64), 0), return_counts=True)
            found.lengths.update(dict(zip(bins.tolist(), numbers.tolist(), strict=True)))
            found.endings.update(_extracted(batch["source"], ENDING, "no ending"))
            is_code, has_language = pc.is_in(batch["origin"], code), pc.match_substring_regex(batch["meta"], LANGUAGE)
            for counts, mask in ((found.programming, is_code), (found.named, pc.invert(is_code))):
                if len(languages := batch["meta"].filter(pc.and_(mask, has_language))):
                    counts.update(_extracted(languages, LANGUAGE, ""))
    except (OSError, KeyError, pa.ArrowException) as error:
        raise CorpusError(f"cannot be read: {error}", where=str(path), remedy="prepare the corpus again") from None
    return found


def _extracted(texts: pa.Array, pattern: str, otherwise: str) -> dict[str, int]:
    counts = pc.value_counts(pc.fill_null(pc.struct_field(pc.extract_regex(texts, pattern), "found"), otherwise)).to_pylist()
    return {count["values"]: count["counts"] for count in counts}


def _lengths(lengths: Counter[int]) -> list[Bar]:
    """Every power of two between the shortest and the longest, those without a document too."""
    if not lengths:
        return []
    bars = [Bar(f"{_power(i) if i else '0'} – {_power(i + 1)}", lengths[i]) for i in range(min(lengths), max(lengths) + 1)]
    return _scaled(bars)


def _languages(data: dict[str, Any]) -> list[Bar]:
    """What the filter found, kept or not."""
    found = data.get("languages") or {}
    unwanted = {name or "unknown": one["unwanted"] for name, one in found.items()}
    bars = _top(Counter({name or "unknown": one["documents"] for name, one in found.items()}))
    return [replace(bar, notes=(*bar.notes, f"{unwanted[bar.name]:,} unwanted")) if unwanted.get(bar.name) else bar for bar in bars]


def _top(counts: Counter[str]) -> list[Bar]:
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    total = sum(counts.values())
    bars = [Bar(name, count) for name, count in rows[:MAX_ROWS]]
    if rest := rows[MAX_ROWS:]:
        bars.append(Bar(f"{len(rest):,} others", sum(count for _, count in rest)))
    return _scaled([Bar(bar.name, bar.value, notes=(f"{100 * bar.value / total:.1f} %",)) for bar in bars])


def _sources(manifest: Manifest) -> list[Bar]:
    """Tokens by source."""
    rows = list[tuple[str, list[int]]]()
    for name, source in zip(manifest.source_names, manifest.sources, strict=True):
        splits = source.get("splits", {}).values()
        if any(split["tokens"] for split in splits):
            rows.append((name, [sum(split[unit] for split in splits) for unit in ("documents", "bytes", "tokens")]))
    rows.sort(key=lambda item: (-item[1][2], item[0]))
    if rest := rows[MAX_ROWS:]:
        rows = [*rows[:MAX_ROWS], (f"{len(rest):,} others", [sum(values[i] for _, values in rest) for i in range(3)])]
    return _scaled([Bar(name, tokens, notes=(f"{documents:,} documents", _size(size), f"{size / tokens:.2f} bytes per token"))
                    for name, (documents, size, tokens) in rows])


def _scaled(bars: list[Bar]) -> list[Bar]:
    most = max((bar.value for bar in bars), default=0)
    return [Bar(bar.name, bar.value, _share(bar.value, most), bar.notes) for bar in bars]


def _decontamination(data: dict[str, Any]) -> list[dict[str, Any]]:
    sets = data.get("decontamination") or {}
    return [{"name": name, **{key: sets[name].get(key, 0) for key in ("texts", "skipped", "ngrams", "found", "documents")}}
            for name in sorted(sets)]


def _figures(data: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Whatever else the manifest tells: (title, rows)."""
    return [(TITLES.get(key, key), [(name, _shown(leaf)) for name, leaf in _leaves(value, "")]) for key, value in sorted(data.items())
            if key not in KNOWN and value]


def _leaves(value: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in _leaves(inner, f"{key}.{name}" if key else str(name))]
    return [(key.replace("_", " "), value)]


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _share(value: int, most: int) -> str:
    return f"{100 * max(0, value) / most:.2f}" if most > 0 else "0"


def _power(exponent: int) -> str:
    return f"{1 << exponent % 10} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[exponent // 10]}"


def _size(value: int) -> str:
    """Bytes for people: three digits or so."""
    if value < 1000:
        return f"{value} B"
    size = float(value)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    return f"{size:.{2 if size < 10 else 1 if size < 100 else 0}f} {unit}"
