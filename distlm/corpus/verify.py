"""Whether a corpus is whole: every checksum, and books that balance.

    verify(storage.corpus("stdlib"))                       # its manifest, or CorpusError for the first that differs
"""

from pathlib import Path

from distlm.corpus.accounts import check_balance, check_sources
from distlm.corpus.manifest import FILE, INPUTS, Manifest, file_xxh3, grouped, other_files, read_manifest, tokenizer_hash
from distlm.errors import CorpusError


def verify(path: Path | str) -> Manifest:
    """Check the books, the size and the hash of every shard, and the hashes of all other files, of inputs.json and of the manifest itself.
    Raises CorpusError for the first that differs. The manifest of a corpus that an earlier distlm has made has neither `files` nor `hash`:
    of such a corpus only the shards, the tokenizer and the list of documents are checked."""
    manifest = read_manifest(path)
    check_balance(manifest.data["steps"], str(path))
    check_sources(manifest.data, str(path))
    for split in manifest.splits.values():
        for shard in split.shards:
            file = manifest.path / shard.file
            size = file.stat().st_size if file.is_file() else None
            if size != shard.bytes:
                raise CorpusError("the shard is missing" if size is None else f"the shard has {size:,} bytes, not {shard.bytes:,}",
                                  where=str(file), remedy="prepare the corpus again")
            if file_xxh3(file) != shard.xxh3:
                raise CorpusError(f"the shard's hash is not {shard.xxh3}: it has been changed or damaged", where=str(file),
                                  remedy="prepare the corpus again")
        if sum(shard.windows for shard in split.shards) != split.windows:
            raise CorpusError("the windows of the shards do not add up", where=str(manifest.path / FILE), remedy="prepare the corpus again")
        given = split.tokens + split.repeated_tokens + split.padding_tokens
        if manifest.best_fit and split.windows * (manifest.context + 1) != given:
            raise CorpusError(f"{split.windows:,} windows do not hold {given:,} tokens: those of the documents, repeated ones and padding",
                              where=str(manifest.path / FILE), remedy="prepare the corpus again")
    if tokenizer_hash(manifest.tokenizer) != manifest.data["tokenizer"]["hash"]:
        raise CorpusError("the tokenizer has been changed", where=str(manifest.tokenizer), remedy="prepare the corpus again")
    if listed := manifest.data.get("documents"):
        file = manifest.path / listed["file"]
        if not file.is_file() or file_xxh3(file) != listed["xxh3"]:
            raise CorpusError("the list of documents is missing or has been changed", where=str(file), remedy="prepare the corpus again")
    _verify_others(manifest)
    return manifest


def _verify_others(manifest: Manifest) -> None:
    listed = manifest.checksums
    if not listed and "hash" not in manifest.data:
        return
    if "hash" not in manifest.data:
        raise CorpusError("it has no hash: it has been changed", where=str(manifest.path / FILE), remedy="prepare the corpus again")
    if manifest.inputs and grouped(manifest.sources) != (manifest.data["sources"], manifest.inputs["sources"]):
        raise CorpusError("its sources do not add up to those of the manifest", where=str(manifest.path / INPUTS),
                          remedy="restore it from a copy, or prepare the corpus again")
    found = {str(file.relative_to(manifest.path)): file for file in other_files(manifest.path)}
    for name in sorted(listed.keys() | found.keys()):
        wrong = "the file is missing" if name not in found else "the file is listed nowhere: it came later" if name not in listed else \
            "the file has been changed" if file_xxh3(found[name]) != listed[name] else ""
        if wrong:
            raise CorpusError(wrong, where=str(manifest.path / name), remedy="prepare the corpus again")
