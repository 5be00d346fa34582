"""Whether two models read the same tokens: what stands for a tokenizer's vocabulary and merges, whatever else its files say."""

import hashlib
import json
from pathlib import Path

from distlm.storage import read_json

FILE = "tokenizer.json"


def vocabulary_hash(folder: Path) -> str | None:
    """SHA-256 of the model of a folder's tokenizer.json; None where there is no such file. Raises StorageError."""
    path = folder / FILE
    return hashlib.sha256(json.dumps(read_json(path).get("model"), sort_keys=True).encode()).hexdigest() if path.is_file() else None
