"""Documents with labels, for classification: what a record's label is called, and which labels a corpus has.

A label is known by its name, the text of its JSON value in Unicode's form NFC; its number is its place among the names of the training
split, or among those that the spec gives.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from distlm.corpus.conversations import Refused
from distlm.errors import CorpusError
from distlm.spec.prepare import Labels, label_name

MAX_SHOWN = 5
NUMBER = re.compile("-?[0-9]{1,18}")


def labels_of(value: Any, rules: Labels) -> list[str]:
    """The names of a record's labels: one, or with `multiple` any number of them. Raises Refused."""
    if value is None:
        raise Refused("no_label", f"no {rules.label_key!r}")
    if isinstance(value, list) != rules.multiple:
        raise Refused("bad_label", f"{rules.label_key!r} is a {type(value).__name__}, and labels.multiple is {str(rules.multiple).lower()}")
    names = [_name(one, rules.label_key) for one in (value if rules.multiple else [value])]
    if len(set(names)) < len(names):
        raise Refused("bad_label", f"{rules.label_key!r} has {Counter(names).most_common(1)[0][0]!r} twice")
    if rules.names is not None and (other := next((name for name in names if name not in rules.names), None)) is not None:
        raise Refused("unknown_label", f"{rules.label_key!r} has {other!r}, which is none of labels.names")
    return names


def _name(value: Any, key: str) -> str:
    name = label_name(value)
    if not isinstance(name, str) or not name:
        raise Refused("no_label" if name is None or name == "" else "bad_label", f"{key!r} has {value!r}, which is no label")
    return name


def labels_in(meta: str, rules: Labels) -> list[str]:
    """The names of a document's labels, out of what is kept beside it, as JSON."""
    return labels_of(json.loads(meta)[rules.label_key], rules)


def ordered(names: Iterable[str]) -> list[str]:
    """The labels by their numbers: whole numbers by value, and those of one value, such as 1 and 01, by their text; all by their text
    (code points) where any is no whole number of at most 18 digits."""
    found = sorted(names)
    return sorted(found, key=int) if all(map(NUMBER.fullmatch, found)) else found


def check_labels(counts: dict[str, Counter[str]], rules: Labels, where: str) -> list[str]:
    """The labels of a corpus, in order: those that the rules name, or those of its documents by split. Raises CorpusError where there is
    then nothing to tell apart, or a held-out document has a label that no training document has."""
    if rules.names is not None:
        return rules.names
    names = ordered(counts["train"])
    for split, found in counts.items():
        if unseen := ordered(found.keys() - counts["train"].keys()):
            shown = first_of([f"{name} ({found[name]:,})" for name in unseen])
            raise CorpusError(f"no training document has the label {shown} of documents of the {split} split", where=where,
                              remedy="leave out labels of so few documents, give more of them, lower split.val_fraction, or list all "
                                     "labels under labels.names")
    if len(names) < (1 if rules.multiple else 2):
        what = f"has the label {names[0]}" if names else "is left with a label"
        raise CorpusError(f"{'every' if names else 'no'} training document {what}: there is nothing to tell apart", where=where,
                          remedy="give texts of another label, look at labels.label_key, or list all labels under labels.names")
    return names


def first_of(names: list[str]) -> str:
    """The first few, and how many more there are."""
    return ", ".join(names[:MAX_SHOWN]) + (f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else "")
