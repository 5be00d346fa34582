import pytest

from distlm.corpus.clean import clean
from distlm.spec.prepare import Clean


def test_line_ends_become_line_feeds_and_control_characters_go() -> None:
    cleaned = clean("a\r\nb\rc\td\x00\x1b[1m\x7f\x85e\n", Clean())
    assert cleaned.text == "a\nb\nc\td[1me\n"
    assert cleaned.control_bytes == len("\r\0\x1b\x7f") + len("\x85".encode())
    assert cleaned.bytes == len(cleaned.text)


def test_control_characters_are_kept_where_the_spec_says_so() -> None:
    assert clean("a\r\n\0", Clean(control_characters="keep")).text == "a\r\n\0"


@pytest.mark.parametrize(("form", "text", "expected"), [
    ("NFC", "e\u0301 ﬁ", "é ﬁ"), ("NFKC", "e\u0301 ﬁ", "é fi"), ("none", "e\u0301 ﬁ", "e\u0301 ﬁ"), ("NFC", "\u0958", "\u0915\u093c")])
def test_the_normal_form_is_applied_and_its_bytes_are_counted_whether_more_or_less(form: str, text: str, expected: str) -> None:
    cleaned = clean(text, Clean(unicode=form))  # type: ignore[arg-type]
    assert cleaned.text == expected
    assert len(text.encode()) == cleaned.bytes + cleaned.unicode_bytes + cleaned.control_bytes
    assert cleaned.bytes == len(expected.encode())


def test_what_is_too_short_after_cleaning_is_rejected() -> None:
    assert clean("\0\0", Clean()).reason == "too_short"
    assert clean("ab", Clean(min_chars=3)).reason == "too_short"
    assert clean("abc", Clean(min_chars=3)).reason == ""
