"""What every document passes before it is kept: encoding, line ends, control characters, Unicode form, white space, redaction, length.

    cleaned = clean(text, rules)
    len(text.encode()) == cleaned.bytes + sum(cleaned.taken.values())
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distlm.errors import InputError
from distlm.spec.curate import Clean
from distlm.text.redact import KINDS, redact

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Unicode's category Cc but for tab and line feed."""
BLANKS = re.compile(r"[^\S\n]{2,}")
EMPTY_LINES = re.compile(r"\n{3,}")

LEAVES_ALL: dict[str, Any] = {"unicode": "none", "control_characters": "keep", "fix_encoding": False, "whitespace": "keep", "redact": []}
"""The keys of `clean` that change a text by what it says itself, with what leaves it as it is."""


@dataclass(frozen=True)
class Cleaned:
    """A document after cleaning, and the UTF-8 bytes that cleaning took from it."""

    text: str
    bytes: int
    taken: dict[str, int] = field(default_factory=dict)
    """By what took them: encoding, control_characters, unicode, whitespace, redacted_email and so on for each kind. Negative where text
    became longer; what took nothing is not there."""
    reason: str = ""
    """`too_short`, or nothing for a document that is kept."""
    redactions: dict[str, int] = field(default_factory=dict)
    """Marks that were set, by kind."""


def clean(text: str, rules: Clean) -> Cleaned:
    """Apply the rules to a document. Raises InputError where ftfy is asked for and not installed."""
    taken: dict[str, int] = {}
    size = _bytes(text)
    for name, step in _steps(rules):
        changed = step(text)
        if changed != text:
            text, before, size = changed, size, _bytes(changed)
            if before != size:
                taken[name] = before - size
    redactions: Counter[str] = Counter()
    for kind in KINDS:
        if kind in rules.redact:
            text, found = redact(text, (kind,))
            if found:
                redactions += found
                before, size = size, _bytes(text)
                if before != size:
                    taken[f"redacted_{kind}"] = before - size
    return Cleaned(text, size, taken, "too_short" if len(text) < rules.min_chars else "", dict(redactions))


def common(rules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What changes a text, of the rules on which all of some agree: every key of LEAVES_ALL, each with what leaves it as it is where they
    do not."""
    found = {key: [one.get(key, none) for one in rules] for key, none in LEAVES_ALL.items()}
    return {key: values[0] if all(value == values[0] for value in values) else LEAVES_ALL[key] for key, values in found.items()}


def _steps(rules: Clean) -> list[tuple[str, Callable[[str], str]]]:
    """In their order: wrongly decoded text may hold control characters, and what is composed may be white space."""
    steps: list[tuple[str, Callable[[str], str]]] = []
    if rules.fix_encoding:
        steps.append(("encoding", _mend))
    if rules.control_characters == "remove":
        steps.append(("control_characters", _without_control))
    if rules.unicode != "none":
        form = rules.unicode
        steps.append(("unicode", lambda text: text if text.isascii() else unicodedata.normalize(form, text)))
    if rules.whitespace != "keep":
        steps.append(("whitespace", _trimmed if rules.whitespace == "trim" else _collapsed))
    return steps


def _mend(text: str) -> str:
    """Undo a wrong decoding, line by line, and nothing else of what ftfy can do: quotes, ligatures and widths stay as they are."""
    if text.isascii():
        return text
    try:
        import ftfy
    except ImportError:
        raise InputError("ftfy is not installed", where="clean.fix_encoding", remedy="pip install distlm[text]") from None
    return ftfy.fix_text(text, unescape_html=False, remove_terminal_escapes=False, fix_latin_ligatures=False, fix_character_width=False,
                         uncurl_quotes=False, fix_line_breaks=False, fix_surrogates=False, remove_control_chars=False, normalization=None)


def _without_control(text: str) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return CONTROL.sub("", text)


def _trimmed(text: str) -> str:
    return "\n".join(map(str.rstrip, text.split("\n"))).strip()


def _collapsed(text: str) -> str:
    return EMPTY_LINES.sub("\n\n", BLANKS.sub(" ", _trimmed(text)))


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
