"""From raw text to a corpus: a folder of checksummed shards of token windows, with a manifest that accounts for every byte.

    prepare(spec, folder, storage, progress)           # distlm.corpus.prepare: the job
    read_manifest(path), manifest_hash(path)
"""

from distlm.corpus.manifest import Manifest, Shard, Split, manifest_hash, read_manifest

__all__ = ["Manifest", "Shard", "Split", "manifest_hash", "read_manifest"]
