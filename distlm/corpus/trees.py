"""What is known of a file of a tree of code beside its text: its language and its licence.

    language("src/a.py")                               # "Python"
    Licenses(root).of(root / "src" / "a.py")           # "MIT", by the nearest licence file; "" where nobody knows
    tagged(text)                                       # "GPL-2.0-only OR MIT", by the tag in the text's head; it comes first
    allows("GPL-2.0-only OR MIT", {"MIT"})             # True
"""

import re
from functools import lru_cache
from pathlib import Path

from pygments.lexers import find_lexer_class_for_filename, get_all_lexers

from distlm.corpus.decompress import ENDINGS
from distlm.corpus.stores import Store

AMBIGUOUS = {".pl": "Perl", ".pm": "Perl", ".t": "Perl", ".r": "R", ".sql": "SQL", ".inc": "", ".cls": "", ".mod": "", ".txt": "",
             ".ipynb": "", ".csv": "", ".rules": "", ".out": "", ".log": ""}
"""Endings of several languages, or of none, of which pygments takes a rarer one."""
HEAD_CHARS = 2000
MAX_LICENSE_BYTES = 1 << 18
TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([A-Za-z0-9.+() -]{0,200}[A-Za-z0-9.+)])")
LICENSE_FILE = re.compile(r"(?:un)?licen[cs]e|copying", re.IGNORECASE)
NOTICE_FILE = re.compile(r"notice", re.IGNORECASE)
_BSD = "redistribution and use in source and binary forms"
_ISC = "modify and or distribute this software for any purpose with or without fee is hereby granted"
_ISC_OLD = "modify and distribute this software for any purpose with or without fee is hereby granted"
_MIT = "permission is hereby granted free of charge to any person obtaining a copy of this software and associated documentation files"
TEXTS: list[tuple[str, list[str], list[str]]] = [
    ("Apache-2.0 WITH LLVM-exception", ["apache license version 2 0", "llvm exceptions to the apache 2 0 license"], []),
    ("Apache-2.0", ["apache license version 2 0"], []),
    ("MIT", [_MIT, "permission notice shall be included"], []),
    ("MIT-0", [_MIT, "the software is provided as is"],
     ["permission notice shall be included", "subject to the following conditions", "redistributions of source code"]),
    ("BSD-4-Clause", [_BSD, "all advertising materials mentioning features", "neither the name"], []),
    ("BSD-3-Clause", [_BSD, "neither the name"], ["all advertising materials mentioning features"]),
    ("BSD-2-Clause", [_BSD, "redistributions in binary form must reproduce"],
     ["neither the name", "advertising materials", "may not be used"]),
    ("ISC", [_ISC, "provided that the above copyright notice"], []), ("ISC", [_ISC_OLD, "provided that the above copyright notice"], []),
    ("0BSD", [_ISC], ["provided that the above copyright notice"]),
    ("MPL-2.0", ["mozilla public license version 2 0"], []),
    ("AGPL-3.0-only", ["gnu affero general public license version 3 19 november 2007"], []),
    ("LGPL-2.1-only", ["gnu lesser general public license version 2 1 february 1999"], []),
    ("LGPL-3.0-only", ["gnu lesser general public license version 3 29 june 2007"], []),
    ("GPL-2.0-only", ["gnu general public license version 2 june 1991"], []),
    ("GPL-3.0-only", ["gnu general public license version 3 29 june 2007"], []),
    ("Unlicense", ["this is free and unencumbered software released into the public domain"], []),
    ("CC0-1.0", ["cc0 1 0 universal"], []), ("CC-BY-4.0", ["creative commons attribution 4 0 international public license"], []),
    ("CC-BY-SA-4.0", ["creative commons attribution sharealike 4 0 international public license"], []),
    ("EPL-2.0", ["eclipse public license v 2 0"], []), ("BSL-1.0", ["boost software license version 1 0"], []),
    ("Zlib", ["without any express or implied warranty", "altered source versions must be plainly marked as such"], []),
    ("PSF-2.0", ["python software foundation license version 2"], [])]
"""SPDX id, phrases that its text has, and phrases that it has not: in small letters, words alone. Of the texts that a file holds, the one
that begins first is taken. A text of the GPL does not say whether later versions may be chosen; a tag does."""


@lru_cache(maxsize=1)
def _names() -> frozenset[str]:
    """The names of files that say their language without an ending, such as Makefile."""
    return frozenset(pattern for _, _, patterns, _ in get_all_lexers(plugins=False) for pattern in patterns if pattern.isidentifier())


def language(path: str) -> str:
    """The programming language by the file's name, as pygments calls it; empty where it knows none."""
    name = path.rsplit("/", 1)[-1]
    if Path(name).suffix.lower() in ENDINGS:
        name = Path(name).stem
    return _language(name if name in _names() or name == "CMakeLists.txt" else Path(name).suffix.lower())


@lru_cache(maxsize=10_000)
def _language(name: str) -> str:
    if not name or name in AMBIGUOUS:
        return AMBIGUOUS.get(name, "")
    found = find_lexer_class_for_filename(f"x{name}" if name.startswith(".") else name)
    return str(found.name) if found else ""


def tagged(text: str) -> str:
    """The SPDX expression that the head of a text gives in a tag of its own, or nothing."""
    found = TAG.search(text, 0, HEAD_CHARS)
    return " ".join(found[1].split()) if found else ""


def recognised(text: str) -> str:
    """The SPDX id of a licence's text, or what its tag says; nothing for a text that is not known."""
    if tag := tagged(text):
        return tag
    words = " ".join(re.findall(r"[a-z0-9]+", text.lower()))
    found = [(words.index(phrases[0]), -len(phrases), name) for name, phrases, others in TEXTS
             if all(phrase in words for phrase in phrases) and not any(phrase in words for phrase in others)]
    return min(found)[2] if found else ""


class Licenses:
    """The licences of a tree, by folder: of this machine, or of an object store."""

    def __init__(self, root: Path, store: Store | None = None) -> None:
        self.root, self.store, self.known = root, store, dict[Path, str]()

    def of(self, path: Path) -> str:
        """What the nearest LICENSE or COPYING says, or a NOTICE that is known; looked for in the file's folder and in those above it, up to
        the root. Several in one folder are joined by AND: nobody says there that one may be chosen."""
        return self._of(path.parent) if path != self.root and path.is_relative_to(self.root) else ""

    def _of(self, folder: Path) -> str:
        if folder not in self.known:
            found = self._read(folder, LICENSE_FILE)
            if not found:
                found = [one for one in self._read(folder, NOTICE_FILE) if one]
            above = self._of(folder.parent) if not found and folder != self.root else ""
            self.known[folder] = " AND ".join(sorted({f"({one})" if len(found) > 1 and " OR " in one.upper() else one for one in found})) \
                if found and all(found) else above
        return self.known[folder]

    def _read(self, folder: Path, names: re.Pattern[str]) -> list[str]:
        """What the files of these names in a folder say; an empty text for one that nobody knows."""
        if self.store:
            files = [Path(info.path) for info in self.store.entries(str(folder), below=False) if info.type.name == "File"]
        else:
            files = [path for path in folder.iterdir() if path.is_file()]
        found = sorted(path for path in files if names.match(path.name) and language(path.name) in ("", "Markdown", "reStructuredText"))
        return [recognised(self._head(path).decode(errors="replace")) for path in found]

    def _head(self, path: Path) -> bytes:
        if self.store:
            head = b""
            for block in self.store.read(str(path)):
                if len(head := head + block) >= MAX_LICENSE_BYTES:
                    break
            return head[:MAX_LICENSE_BYTES]
        with path.open("rb") as file:
            return file.read(MAX_LICENSE_BYTES)


def allows(expression: str, keep: frozenset[str] | set[str]) -> bool:
    """Whether an SPDX expression can be met with the ids that are kept; what is no expression cannot. The case of ids does not count (SPDX
    2.3, annex D.2)."""
    words = re.findall(r"[()]|[^\s()]+", expression.casefold())[::-1]
    keep = {" ".join(one.casefold().split()) for one in keep}

    def either() -> bool:
        value = both()
        while words and words[-1] == "or":
            words.pop()
            value = both() or value                        # what stands there is to be read in any case
        return value

    def both() -> bool:
        value = one()
        while words and words[-1] == "and":
            words.pop()
            value = one() and value
        return value

    def one() -> bool:
        word = words.pop()
        if word == "(":
            value = either()
            if words.pop() != ")":
                raise IndexError
            return value
        if words and words[-1] == "with":          # an exception allows more
            words.pop()
            whole = f"{word} with {words.pop()}"
            return word in keep or whole in keep
        return word in keep

    try:
        return either() and not words
    except IndexError:
        return False
