"""What every document passes before it is kept: line ends, control characters, Unicode normal form, length."""

import re
import unicodedata
from dataclasses import dataclass

from distlm.spec.prepare import Clean

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Unicode's category Cc but for tab and line feed."""


@dataclass(frozen=True)
class Cleaned:
    """A document after cleaning, and the UTF-8 bytes that cleaning took from it."""

    text: str
    bytes: int
    control_bytes: int
    unicode_bytes: int
    """Negative where the normal form is the longer one."""
    reason: str = ""
    """`too_short`, or nothing for a document that is kept."""


def clean(text: str, rules: Clean) -> Cleaned:
    """Apply the rules to a document."""
    before = _bytes(text)
    if rules.control_characters == "remove":
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if CONTROL.search(text):
            text = CONTROL.sub("", text)
    between = _bytes(text)
    after = between
    if rules.unicode != "none" and not text.isascii():
        text = unicodedata.normalize(rules.unicode, text)
        after = _bytes(text)
    return Cleaned(text, after, before - between, between - after, "too_short" if len(text) < rules.min_chars else "")


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
