import base64
import random
import sysconfig
import time
from pathlib import Path

import pytest

from distlm.text.redact import KINDS, redact

SIZE = 1 << 20
KEY = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEAx3Jq1zq9W0dYk2u7\n" * 3 + "-----END RSA PRIVATE KEY-----"


def one(text: str, kind: str) -> str:
    return redact(text, (kind,))[0]


@pytest.mark.parametrize(("text", "expected"), [
    ("mail ada@lovelace.org.", "mail <|email|>."),
    ("<ada.b+c@x.co.uk>, 'a_b%c@sub.x-y.de'", "<<|email|>>, '<|email|>'"),
    ("联系我abc@163.com谢谢", "联系我<|email|>谢谢"),
    ("mailto:jörg@müller.de?subject=x", "mailto:<|email|>?subject=x"),
    ("Write to ada@lovelace.org.Then wait", "Write to <|email|>.Then wait"),
    ("ADA@EXAMPLE.COM,bob@x.photography", "<|email|>,<|email|>")])
def test_email_addresses_are_found(text: str, expected: str) -> None:
    assert one(text, "email") == expected


@pytest.mark.parametrize("text", [
    "y = x@self.weight", "x@W.to(device)", "@dataclass.field", "icon@2x.png", "git@github.com:a/b.git", "http://user:pw@host.com/",
    "ssh://user@host.org/a", "lodash@4.17.21", "pkg@1.2.3.dev", "a@b", "a@b.invalid", "user@localhost", "spam.py: foo@bar.py",
    "x" * 65 + "@long.org", "@ada.org", "ada.@lovelace.org"])
def test_what_only_has_an_at_sign_stays(text: str) -> None:
    assert one(text, "email") == text


@pytest.mark.parametrize(("text", "expected"), [
    ("from 84.10.20.1, or 84.10.20.2:8080.", "from <|ip|>, or <|ip|>:8080."),
    ("http://84.10.20.1/x [84.10.20.1] ::ffff:84.10.20.1", "http://<|ip|>/x [<|ip|>] ::ffff:<|ip|>"),
    ("8.8.8.8 and server 1.1.1.1, 'IP Address', '14.15.16.17'",
     "<|ip|> and server <|ip|>, 'IP Address', '<|ip|>'"),
    ("2a00:1450:4001:81b::200e. [2001:4860:4860::8888]:80", "<|ip|>. [<|ip|>]:80"),
    ("地址84.10.20.1的", "地址<|ip|>的")])
def test_public_ip_addresses_are_found(text: str, expected: str) -> None:
    assert one(text, "ip") == expected


@pytest.mark.parametrize("text", [
    "10.0.0.1 192.168.1.1 172.16.0.9 127.0.0.1 169.254.1.1 100.64.0.1", "192.0.2.7 198.51.100.7 203.0.113.7", "224.0.0.251 255.255.255.255",
    "84.10.20.256", "084.010.020.001", "84.10.20.1.5", "1.84.10.20.1", "version 84.10.20.1", "v84.10.20.1", "__version__ = '84.10.20.1'",
    "pip install a==84.10.20.1", "Chrome/84.10.20.1", "Chrome/120.0.0.0", "lib-84.10.20.1", "84.10.20.1-beta", "section 8.2.4.44",
    "4.26.2.8 8.2.4.244", "3.1.2.0", "host 1.2.3.4", "(2.5.29.15)", "120.0.0.0",
    "fe80::1 ::1 2001:db8::1 fc00::1", "x[2000::2] std::a 12:34:56 a[1::2]",
    "2a:00:14:50:40:01:08:1b"])
def test_private_addresses_and_versions_stay(text: str) -> None:
    assert one(text, "ip") == text


@pytest.mark.parametrize("number", [
    "+49 30 1234567", "+49 (0)30 123 45 67", "+4915112345678", "+33 6 12 34 56 78", "+44 20 7946 0958", "+86 138 1234 5678", "+14155552671",
    "+1 (415) 555-2671", "+31-641044153", "(415) 555-2671", "415-555-2671", "415.555.2671", "1-800-555-1234", "(415) 555-2671 x123",
    "020 7946 0958", "0161 496 0000", "07700 900123", "(020) 7946 0958", "030/1234567", "0151 12345678", "06 12 34 56 78", "06.12.34.56.78",
    "(11) 91234-5678", "090-1234-5678", "138-1234-5678", "0412 345 678"])
def test_telephone_numbers_are_found(number: str) -> None:
    for before, after in (("", ""), ("call ", ", now"), ("(", ")"), ("电话:", "的"), ("tel:", ".\n")):
        assert one(before + number + after, "phone") == before + "<|phone|>" + after


def test_numbers_of_any_shape_are_telephones_behind_the_word() -> None:
    assert one("Tel.: 98765 43210", "phone") == "Tel.: <|phone|>"
    assert one("98765 43210", "phone") == "98765 43210"


@pytest.mark.parametrize("text", [
    "12345678901", "call 1234567", "phone 4155552671", "2023-01-02", "01-02-2003", "01.02.2003", "tel 2023-01-02", "2023-01-02 10:00:00",
    "978-3-16-148410-0", "ISBN 0-306-40615-2", "3.14159265", "-415.5552671", "Decimal('+35236450.6')", "x +12", "a+4915112345678",
    "1e+4915112345", "+10011010010", "01 23 45 67 89 ab cd", "00 01 23 45 67 89", "ab 01 23 45 67 89", "+49123456",
    "[100 200 3000]", "1234 5678 9012", "phone 10.0.0.1",
    "550e8400-e29b-41d4-a716-446655440000", "415-555-2671-9", "123-45-6789", "2019-2023", "+0100", "1,415-555-2671", "id/415-555-2671"])
def test_digits_dates_isbns_and_floats_are_no_telephones(text: str) -> None:
    assert one(text, "phone") == text


@pytest.mark.parametrize("number", [
    "4111111111111111", "4111 1111 1111 1111", "4111-1111-1111-1111", "5555555555554444", "2223003122003222", "378282246310005",
    "3782 822463 10005", "6011111111111117", "3530111333300000", "30569309025904", "6212345678901232", "4222222222222"])
def test_payment_cards_are_found(number: str) -> None:
    assert one(f"card {number}, 12/27", "card") == "card <|card|>, 12/27"
    assert one(f"{number} 12/27 123", "card") == "<|card|> 12/27 123"


@pytest.mark.parametrize("text", [
    "4111111111111112", "1111111111111117", "9999999999999995", "0.4111111111111111", "4111111111111111.5", "4111111111111111-a",
    "a4111111111111111",
    "4111 1111 1111 1111 1111", "1234 4111 1111 1111 1111", "4 111111111111111", "41111111 11111111", "4111 1111-1111 1111",
    "4000000000000000", "1700000000000", "4006381330060", "4006381330169", "411111111111", "44444444444444444444"])
def test_digits_without_luhns_sum_an_issuer_or_a_cards_grouping_stay(text: str) -> None:
    assert one(text, "card") == text


@pytest.mark.parametrize("secret", [
    "AKIAIOSFODNN7EXAMPLE", "ghp_abcdefghijklmnopqrstuvwxyzABCDEF0123", "glpat-a1B2c3D4e5F6g7H8i9J0", "xoxb-123456789012-abcdefGHIJKL",
    "sk_" + "live_a1B2c3D4e5F6g7H8i9J0", "AIzaSyA1234567890abcdefghijklmnopqrstuv", "sk-proj-Ab3dEf6hIj9lMn2pQr5tUv8x",
    "hf_AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    KEY, KEY.replace("\n", "\\n")])
def test_keys_and_tokens_of_the_common_shapes_are_found(secret: str) -> None:
    assert redact(f"x = '{secret}' # {secret}\n", ("secret",)) == ("x = '<|secret|>' # <|secret|>\n", {"secret": 2})


@pytest.mark.parametrize(("text", "expected"), [
    ('password="Tr0ub4dor&3"', 'password="<|secret|>"'),
    ('{"db_password": "xK9#mP2$vL", "a": 1}', '{"db_password": "<|secret|>", "a": 1}'),
    ("API_KEY: a8F3kd92LsPq0Zx7Vb5N\n", "API_KEY: <|secret|>\n"),
    ("config['apiKey'] = b'a8F3kd92LsPq0Zx7Vb5N'", "config['apiKey'] = b'<|secret|>'"),
    ("export AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYzzWq8Rt2nB", "export AWS_SECRET_ACCESS_KEY=<|secret|>"),
    ("token := 0f1e2d3c4b5a69788796a5b4c3d2e1f0;", "token := <|secret|>;"),
    ("Authorization: Bearer a8F3kd92LsPq0Zx7Vb5Nq", "Authorization: Bearer <|secret|>"),
    ("postgres://app:s3cr3Pw9x@db.host/x", "postgres://app:<|secret|>@db.host/x"),
    ("password='Tr0ub4dor&3' AKIAIOSFODNN7EXAMPLE password='Tr0ub4dor&3'", "password='<|secret|>' <|secret|> password='<|secret|>'"),
    ("\u0130\u0130 password='Tr0ub4dor&3'", "\u0130\u0130 password='<|secret|>'")])
def test_secrets_that_are_assigned_to_a_telling_name_are_found(text: str, expected: str) -> None:
    assert one(text, "secret") == expected


@pytest.mark.parametrize("text", [
    "password = 'changeme'", "PASSWORD=${DB_PASSWORD}", "password: str = field(default='')", "password=getpass.getpass('Password1!: ')",
    "token = tokens[index2]", "token='NAME_OR_OP'", "token = self.next_token2(line)", "secret: Optional[str] = None",
    "api_key: YOUR_API_KEY_123", "key='a8F3kd92LsPq0Zx7Vb5N'", "sha256 = '0f1e2d3c4b5a69788796a5b4c3d2e1f0'", "password='{pw}'",
    "secret = 'xxxxxxxx1X'", "password='Password1!'", "token = 'example-1a2b3c4d5e6f7g8h9i0'", "hf_aBaBaBaBaBaBaBaBaBaBaBaBaBaBaBaBaB",
    "sk-fading-circle-animation-item", "task-Ab3dEf6hIj9lMn2pQr5tUv8x",
    "hf_hub_download_with_a_long_function_name",
    "http://user:pass@host/",
    "-----BEGIN PRIVATE KEY-----", "a = '-----BEGIN PRIVATE KEY-----'\nb = '-----END PRIVATE KEY-----'",
    "-----BEGIN CERTIFICATE-----\n" + "MIIEpAIBAAKCAQEAx3Jq1zq9W0dYk2u7\n" * 3 + "-----END CERTIFICATE-----"])
def test_placeholders_names_of_code_and_public_values_stay(text: str) -> None:
    assert one(text, "secret") == text


def test_only_the_kinds_that_are_asked_for_are_redacted_whatever_their_order() -> None:
    text = "ada@lovelace.org 84.10.20.1 +49 30 1234567, 4111111111111111 ghp_abcdefghijklmnopqrstuvwxyzABCDEF0123 bob@lovelace.org"
    assert redact(text, ()) == (text, {})
    assert redact(text, ["email"])[1] == {"email": 2}
    assert redact(text, tuple(KINDS)) == redact(text, tuple(reversed(KINDS))) == (
        "<|email|> <|ip|> <|phone|>, <|card|> <|secret|> <|email|>", {"email": 2, "ip": 1, "phone": 1, "card": 1, "secret": 1})


def test_code_of_the_standard_library_hardly_changes() -> None:
    folder = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text() for path in sorted(folder.glob("*.py"))[::3]]
    for kind, per_megabyte in (("secret", 0.0), ("card", 0.0), ("phone", 0.0), ("ip", 2.0)):
        assert sum(redact(text, (kind,))[1][kind] for text in texts) <= per_megabyte * sum(map(len, texts)) / 1e6, kind


HOSTILE = {
    "a@": "a@", "a@a.": "a@a.", "a.": "a.", "@a.com": "@a.com", "x@a.com ": "x@a.com ", "1-": "1-", "12-": "12-", "123 ": "123 ",
    "0123 ": "0123 ", "+": "+", "+49123": "+49123", "digits": "1", "fours": "4", "1.": "1.", "84.10.20.1 ": "84.10.20.1 ",
    "2001:": "2001:", ":": ":",
    "://a:": "://a:", "BEGIN": "-----BEGIN PRIVATE KEY-----", "BEGIN a-": "-----BEGIN PRIVATE KEY-----" + "a-" * 500,
    "eyJ": "eyJ", "eyJ.": "eyJaaaaaaaa.",
    "sk-": "sk-", "password=": "password=", "password='": "password='a1B!a1B!'", "token ": "token" + " " * 1000, "bearer ": "bearer ",
    "tel 1": "tel 123 45 ", "base64": base64.b64encode(random.Random(0).randbytes(SIZE * 3 // 4)).decode(),
    "hex": random.Random(0).randbytes(SIZE // 2).hex()}


@pytest.mark.parametrize("name", HOSTILE)
def test_time_stays_linear_in_hostile_text(name: str) -> None:
    text = (HOSTILE[name] * (SIZE // len(HOSTILE[name]) + 1))[:SIZE]
    start = time.process_time()
    redact(text, tuple(KINDS))
    assert time.process_time() - start < 20, "a second on a slow machine; hours where it is quadratic"
