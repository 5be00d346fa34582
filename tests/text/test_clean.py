import importlib.util
import random
import sys

import pytest

from distlm.errors import InputError
from distlm.spec.curate import Clean
from distlm.text.clean import clean

REDACT = ("email", "ip", "phone", "card", "secret")


def test_line_ends_become_line_feeds_and_control_characters_go() -> None:
    cleaned = clean("a\r\nb\rc\td\x00\x1b[1m\x7f\x85e\n", Clean())
    assert cleaned.text == "a\nb\nc\td[1me\n"
    assert cleaned.taken == {"control_characters": len("\r\0\x1b\x7f") + len("\x85".encode())}
    assert cleaned.bytes == len(cleaned.text)


def test_control_characters_are_kept_where_the_spec_says_so() -> None:
    assert clean("a\r\n\0", Clean(control_characters="keep")).text == "a\r\n\0"


@pytest.mark.parametrize(("form", "text", "expected"), [
    ("NFC", "e\u0301 ﬁ", "é ﬁ"), ("NFKC", "e\u0301 ﬁ", "é fi"), ("none", "e\u0301 ﬁ", "e\u0301 ﬁ"), ("NFC", "\u0958", "\u0915\u093c")])
def test_the_normal_form_is_applied_and_its_bytes_are_counted_whether_more_or_less(form: str, text: str, expected: str) -> None:
    cleaned = clean(text, Clean(unicode=form))  # type: ignore[arg-type]
    assert cleaned.text == expected
    assert cleaned.taken == ({"unicode": len(text.encode()) - len(expected.encode())} if text != expected else {})
    assert cleaned.bytes == len(expected.encode())


def test_what_is_too_short_after_cleaning_is_rejected() -> None:
    assert clean("\0\0", Clean()).reason == "too_short"
    assert clean("ab", Clean(min_chars=3)).reason == "too_short"
    assert clean("abc", Clean(min_chars=3)).reason == ""
    assert clean("a  \n ", Clean(min_chars=3, whitespace="trim")).reason == "too_short"


@pytest.mark.parametrize(("whitespace", "expected"), [
    ("keep", "\n  a  b \n\tc\u00a0\n\n\n\nd\u2003 e  \n \n"), ("trim", "a  b\n\tc\n\n\n\nd\u2003 e"), ("collapse", "a b\n\tc\n\nd e")])
def test_white_space_is_kept_trimmed_or_collapsed(whitespace: str, expected: str) -> None:
    text = "\n  a  b \n\tc\u00a0\n\n\n\nd\u2003 e  \n \n"
    cleaned = clean(text, Clean(whitespace=whitespace))  # type: ignore[arg-type]
    assert cleaned.text == expected
    assert cleaned.taken.get("whitespace", 0) == len(text.encode()) - len(expected.encode())


def test_one_empty_line_stays_where_white_space_is_collapsed() -> None:
    assert clean("a\n\nb\n\n\nc \n \n\nd", Clean(whitespace="collapse")).text == "a\n\nb\n\nc\n\nd"


def test_wrongly_decoded_text_is_mended_line_by_line_and_nothing_else_of_it_is_changed() -> None:
    pytest.importorskip("ftfy")
    right = "“Größe” ﬁ &amp; Ｗ’s\r\n"
    text = "GrÃ¶ÃŸe\n" + right
    cleaned = clean(text, Clean(fix_encoding=True, unicode="none", control_characters="keep"))
    assert cleaned.text == "Größe\n" + right
    assert cleaned.taken == {"encoding": len(text.encode()) - len(cleaned.text.encode())}
    assert clean(text, Clean(unicode="none", control_characters="keep")).text == text


def test_encoding_comes_before_control_characters_which_a_wrong_decoding_leaves() -> None:
    pytest.importorskip("ftfy")
    assert clean("Ã\x89mile".encode().decode(), Clean(fix_encoding=True)).text == "Émile"


def test_where_ftfy_is_missing_the_error_names_the_key_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean("ascii", Clean(fix_encoding=True)).text == "ascii"
    with pytest.raises(InputError, match=r"clean.fix_encoding: .*pip install distlm\[text\]"):
        clean("é", Clean(fix_encoding=True))


def test_what_is_redacted_is_counted_by_kind_in_marks_and_in_bytes() -> None:
    text = "ada@lovelace.org é 84.10.20.1 a@b.de"
    cleaned = clean(text, Clean(redact=("ip", "email")))
    assert cleaned.text == "<|email|> é <|ip|> <|email|>"
    assert cleaned.redactions == {"email": 2, "ip": 1}
    assert cleaned.taken == {"redacted_email": len("ada@lovelace.org") + len("a@b.de") - 2 * len("<|email|>"),
                             "redacted_ip": len("84.10.20.1") - len("<|ip|>")}
    assert clean(text, Clean()).redactions == {}


def test_redaction_sees_the_text_that_the_other_steps_leave() -> None:
    assert clean("ada@\0lovelace.org", Clean(redact=("email",))).text == "<|email|>"
    assert clean("ａｄａ＠lovelace.org", Clean(redact=("email",), unicode="NFKC")).text == "<|email|>"


PIECES = ("a", "b ", "\r\n", "\r", "\n", "  ", "\t", "\0", "\x85", "é", "e\u0301", "\u0958", "ﬁ", "\u00a0", "漢", "😀", "Ã¶",
          "ada@lovelace.org", "84.10.20.1", " +49 30 1234567,", "4111111111111111", " password='Tr0ub4dor&3' ", "8", ".", "@", "-")


@pytest.mark.parametrize("seed", range(20))
def test_bytes_before_are_bytes_after_and_what_each_rule_took(seed: int) -> None:
    chance = random.Random(seed)
    fix_encoding = seed % 2 == 1 and importlib.util.find_spec("ftfy") is not None
    for _ in range(40):
        text = "".join(chance.choices(PIECES, k=chance.randrange(30)))
        rules = Clean.model_validate({
            "unicode": chance.choice(("NFC", "NFKC", "none")), "control_characters": chance.choice(("keep", "remove")),
            "whitespace": chance.choice(("keep", "trim", "collapse")), "fix_encoding": fix_encoding,
            "redact": chance.sample(REDACT, chance.randrange(6))})
        cleaned = clean(text, rules)
        assert cleaned.bytes == len(cleaned.text.encode())
        assert cleaned.bytes + sum(cleaned.taken.values()) == len(text.encode())
        assert 0 not in cleaned.taken.values()
        assert sum(cleaned.redactions.values()) == cleaned.text.count("<|")
        assert {name.removeprefix("redacted_") for name in cleaned.taken if name.startswith("redacted_")} <= set(cleaned.redactions)
        assert set(cleaned.redactions) <= set(rules.redact)
