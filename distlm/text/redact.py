"""Personal data and secrets are replaced by a mark of their kind, such as `<|email|>`.

    text, counts = redact("mail ada@lovelace.org", ("email", "ip"))        # "mail <|email|>", {"email": 1}

Precision comes first: what may as well be a version, a date, a number of a table or an identifier of code stays. Each kind is found in two
steps: a pattern whose first characters are rare, so that text without any passes at hundreds of MB/s, and a check of what was found (the
address space of `ipaddress`, Luhn's sum, the shape of numbers in use, randomness). Every pattern looks at a bounded number of characters
from each start, or takes a run as a whole, so that time stays linear in whatever text.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import lru_cache

import regex

Span = tuple[int, int]


def redact(text: str, kinds: Collection[str]) -> tuple[str, Counter[str]]:
    """The text with its marks, and how many there are of each kind. The order of `kinds` has no meaning: see KINDS."""
    counts: Counter[str] = Counter()
    for kind, find in KINDS.items():
        if kind in kinds and (spans := _disjoint(find(text))):
            counts[kind] = len(spans)
            text = _marked(text, spans, f"<|{kind}|>")
    return text, counts


def _disjoint(spans: Iterator[Span]) -> list[Span]:
    """In order; those that overlap are one."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _marked(text: str, spans: list[Span], mark: str) -> str:
    pieces, last = list[str](), 0
    for start, end in spans:
        pieces += (text[last:start], mark)
        last = end
    return "".join([*pieces, text[last:]])


# E-mail addresses: found by their @, with the domain after it and the local part before it.

DOMAIN = regex.compile(r"""(?x) @ (?: [A-Za-z0-9\u00c0-\u024f-]{1,63}+ \.(?=[A-Za-z]|[^\W_]+\.) ){1,8}+
    (?: xn--[A-Za-z0-9-]{2,20}+ | [A-Za-z]{2,24}+ )
    (?! [A-Za-z0-9_\u00c0-\u024f(@] )""")
LOCAL = re.compile(r"[A-Za-z0-9\u00c0-\u024f._%+-]+")
LOCAL_CHARS = 64
FILES = ("py", "rs", "md", "sh", "so")
"""Countries where hardly anybody has a domain without a further label, and code has files."""
NUMBERS = re.compile(r"@\d+\.\d")
TOP_LEVELS = frozenset(re.findall("[a-z]+", """
    com org net edu gov mil int info biz name pro aero coop museum jobs mobi travel tel cat asia post
    academy agency app art bank berlin blog care center cloud club codes company computer consulting cool design dev digital earth
    education email energy engineer engineering events expert finance foundation fund fun games global group guru hamburg health help host
    hotel house institute international io law legal life link live llc london love ltd management marketing media moe money network news
    ngo nyc one ong online page paris partners photo photos photography pictures press rocks run school science scot services shop site
    social software solutions space store studio support swiss systems team tech technology tips today tokyo tools top training university
    vip wales web website wiki work works world wtf xyz zone"""))


def _emails(text: str) -> Iterator[Span]:
    for match in DOMAIN.finditer(text) if "@" in text else ():
        at, end = match.span()
        before = text[max(0, at - LOCAL_CHARS - 1):at]
        local = LOCAL.match(before[::-1])
        if not local or len(local[0]) > LOCAL_CHARS:
            continue
        start = at - len(local[0].rstrip(".-%+"))          # reversed: these do not begin an address
        owner = text[start:at]
        if not owner or owner[-1] == "." or owner == "git" or (NUMBERS.match(match[0]) and match[0].count(".") > 1):
            continue                                        # git@host:path, package@1.2.3.dev
        labels = match[0][1:].split(".")
        if len(labels) > 2 and labels[-1].istitle() and _is_top_level(labels[-2]):
            end -= len(labels.pop()) + 1                    # "ada@lovelace.org.Then": a sentence's end without its space
        if len(labels) == 2 and labels[-1] in FILES:
            continue
        if _is_top_level(labels[-1]) and not URL_USER.search(text, max(0, start - LOCAL_CHARS), start):
            yield start, end


URL_USER = re.compile(r"://[^\s/@]*\Z")


def _is_top_level(label: str) -> bool:
    """Countries have two letters; of the others those in common use, for `a@b.weight` is a product of matrices."""
    label = label.lower()
    return (len(label) == 2 and label.isalpha()) or label in TOP_LEVELS or label.startswith("xn--")


# IP addresses, public ones.

IPV4 = regex.compile(r"[0-9](?<![\w.][0-9])[0-9]{0,2}+(?:\.[0-9]{1,3}+){3}(?!\w|\.\w|[-+~][A-Za-z])", regex.A)
IPV6 = regex.compile(r"[23](?<![\w:.][23])[0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}+:){1,6}[0-9A-Fa-f]{0,4}+(?![\w:]|\.\w)", regex.A)
NO_ADDRESS = regex.compile(r"""(?xir) (?: \bv | (?:\b|_) (?: versions? | ver | release | revision | rev | build | section | sec
    | chapter | oid | firmware | python | update ) [\s.:="'(_]{0,6} | § \s? | [=<>~!]= \s? | [a-z] [/_-] )\Z""")
"""What stands before a version, a section or an object identifier."""
ADDRESS_WORD = regex.compile(r"(?ir)\b(?:ip|ipv4|dns|host|server|address|addr|nameserver|ping|client|peer|from)\b[\s:=,\"'(\[]{0,6}\Z|//\Z")
CONTEXT_CHARS = 24
SMALL = re.compile(r"(?:\d\.){3}\d+|(?:(?:[12]?\d|3[01])(?:\.|\Z)){4}")
"""Four parts as versions and sections have them: below 32, as in one of 4,096 addresses, or with three of one digit."""
RESOLVERS = ("8.8.8.8", "8.8.4.4", "9.9.9.9")
NOT_ADDRESSES = re.compile(r"[1-9]\d*\.0\.0\.0|2\.5\.(?:4|29)\.\d+|1\.2\.3\.4|1\.3\.6\.1")
"""`Chrome/120.0.0.0`, object identifiers of X.500 and of the internet, and the number that everybody makes up."""


def _ips(text: str) -> Iterator[Span]:
    for match in IPV4.finditer(text):
        if _is_public(match[0]) and not NOT_ADDRESSES.fullmatch(match[0]):
            before = text[max(0, match.start() - CONTEXT_CHARS):match.start()]
            if not NO_ADDRESS.search(before) and (not SMALL.fullmatch(match[0]) or match[0] in RESOLVERS or ADDRESS_WORD.search(before)):
                yield match.span()
    for match in IPV6.finditer(text):
        if _is_public(match[0]) and len(match[0].replace("::", ":").strip(":").split(":")) > 2:
            yield match.span()


@lru_cache(1 << 14)
def _is_public(address: str) -> bool:
    try:
        value = ipaddress.ip_address(address)
    except ValueError:
        return False
    return value.is_global and not value.is_multicast


# Payment cards.

CARD = regex.compile(r"""(?xa) [2-6] (?<! [\w.,+\#$-] [2-6] )
    (?: [0-9]{12,18}+
      | (?<! [0-9]{4} [ ] [2-6] ) [0-9]{3} ([ -]) (?: [0-9]{4} (?: \1 [0-9]{4} ){2} (?: \1 [0-9]{3} )? | [0-9]{6} \1 [0-9]{4,5} )
        (?! [ ][0-9]{4}\b ) )
    (?! \w | [.,][0-9] | -\w )""")
ISSUERS = re.compile(r"""(?x) 4 (?: \d{12} | \d{15} | \d{18} )                                            # Visa
    | (?: 5[1-5]\d\d | 222[1-9] | 22[3-9]\d | 2[3-6]\d\d | 27[01]\d | 2720 ) \d{12}                      # Mastercard
    | 3[47]\d{13} | 3(?: 0[0-5] | [689]\d ) \d{11}                                                      # American Express, Diners Club
    | (?: 6011 | 64[4-9]\d | 65\d\d ) \d{12} (?: \d{3} )? | 35(?: 2[89] | [3-8]\d ) \d{12}                # Discover, JCB
    | 62\d{14,17} | (?: 5018 | 5020 | 5038 | 5893 | 6304 | 6759 | 676[1-3] ) \d{9,15}                    # UnionPay, Maestro""")


def _cards(text: str) -> Iterator[Span]:
    for match in CARD.finditer(text):
        digits = match[0].replace(" ", "").replace("-", "")
        if ISSUERS.fullmatch(digits) and _luhn(digits) and not (len(digits) == 13 and _is_article(digits)):
            yield match.span()


def _luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    doubled = "".join(str(2 * int(digit)) for digit in digits[-2::-2])
    return sum(map(int, doubled + digits[-1::-2])) % 10 == 0


def _is_article(digits: str) -> bool:
    """Whether the check digit of an EAN-13, the number on goods, is right."""
    return (sum(map(int, digits[0::2])) + 3 * sum(map(int, digits[1::2]))) % 10 == 0


# Telephone numbers.

INTERNATIONAL = regex.compile(r"""(?xa) \+ (?<! [\w)\]+.] \+ )
    (?: 1 [ .-]? (?: \( [0-9]{3} \) | [0-9]{3} ) [ .-]? [0-9]{3} [ .-]? [0-9]{4}
      | (?: 7 | 2[07] | 3[0-469] | 4[013-9] | 5[1-8] | 6[0-6] | 8[1246] | 9[0-58]
          | 2[1-6]\d | 29[01789] | 3[578]\d | 42[013] | 50\d | 59\d | 6[789]\d | 80[08] | 85[02356] | 8[78]\d | 96\d | 97\d | 99[2-8] )
        (?: [ .-]? [0-9]{8,12}+ | (?: [ .\-/()\u00a0\u2011]{0,2} [0-9] ){6,12}+ (?! [ -][0-9] ) ) )
    (?! \w | [.,]?[0-9] )""")
PLAIN_NUMBER = re.compile(r"\+\d+\.\d+|\+1(?:[01]\d{9}|\d{3}[01]\d{6})|\+\d+0{6}")
"""Decimals, and what no exchange of North America has."""
NATIONAL = regex.compile(r"""(?xa) [(0-9] (?<! [\w.,+\#$=/-] [(0-9] ) [0-9]{0,4}+ \)? (?: [ /.-]{1,3} [0-9]{2,8}+ ){1,4}+""")
SHAPES = regex.compile(r"""(?xa) (?:
    (?: 1[ .-] )? (?: \([1-9]\d\d\) [ ]? | [1-9]\d\d [.-] ) \d{3} [.-] \d{4} (?: [ ]? (?: x | ext\.? ) [ ]? \d{1,5} )?    # US, Canada
    | \( 0\d{1,4} \) [ ]? \d{3,8} (?: [ -] \d{2,4} ){0,3}                                      # (020) 7946 0958, (030) 1234567
    | 0[1-9]\d{1,3} [ ]? / [ ]? \d{5,8} | 0[1-9] (?: ([.-]) \d\d ) (?: \1 \d\d ){3}            # Germany, France
    | 0\d - \d{4} - \d{4} | 0\d\d - \d{3,4} - \d{4} | 1[3-9]\d - \d{4} - \d{4}                 # Japan, China
    | \(\d\d\) [ ]? 9?\d{4} - \d{4}                                                           # Brazil
    | (?<! [0-9A-Fa-f]{2} [ ] ) (?: 0\d\d [ ] \d{4} [ ] \d{4} | 0\d{3} [ ] \d{3} [ ] \d{3,4}    # United Kingdom, Australia
        | 07\d{3} [ ] \d{3} [ ]? \d{3} | 01[5-7]\d [ -] \d{7,8} | 0[1-9] (?: [ ] \d\d ){4} ) (?! [ ][0-9A-Fa-f]{2,4}\b )
    ) (?! \w | [.,/:-]\d )""")
PHONE_WORD = re.compile(r"(?i)\b(?:tel|tél|telefon|tel[ée]fono|t[ée]l[ée]phone|phone|cellphone|mobile?|handy|fax|whatsapp|hotline"
                        r"|call (?:us|me))\b[^\n\d]{0,12}\Z")
NO_PHONE = re.compile(r"\d{4}[ ./-]\d\d[ ./-]\d\d|\d\d?[ ./-]\d\d[ ./-]\d\d(?:\d\d)?"
                      r"|\d+\.\d+|\d{1,3}(?:\.\d{1,3}){3}|(?:19|20)\d\d ?[-/] ?(?:19|20)\d\d")
"""Dates, decimals, IP addresses, spans of years."""


def _phones(text: str) -> Iterator[Span]:
    for match in INTERNATIONAL.finditer(text) if "+" in text else ():
        digits = sum(map(match[0].count, "0123456789"))
        plain = digits + 1 == len(match[0])
        if (digits >= (10 if plain else 8) and match[0].count("(") == match[0].count(")")
                and not PLAIN_NUMBER.fullmatch(match[0])):
            yield match.span()
    place = 0
    while match := NATIONAL.search(text, place):
        start, place = match.span()
        if shape := SHAPES.match(text, start) or (text[start] == "(" and SHAPES.match(text, start + 1)):
            place = shape.end()
            yield shape.span()
        elif (7 <= sum(map(match[0].count, "0123456789")) <= 12 and not NO_PHONE.fullmatch(match[0])
                and PHONE_WORD.search(text, max(0, start - CONTEXT_CHARS), start)):
            yield start + (match[0].startswith("(") and ")" not in match[0]), place


# Secrets: private keys, tokens that name their issuer, passwords in URLs, and random values that are assigned to a telling name.

PRIVATE_KEY = regex.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
                            r"(?:[^-]++|-(?!----))*+-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
KEY_MATERIAL = re.compile(r"[A-Za-z0-9+/=]{32}")
TOKEN = re.compile(r"""(?xa) \b (?= [AgxsrwyGhenpS] ) (?<! - ) (?:
    (?: AKIA | ASIA | ABIA | ACCA ) [A-Z2-7]{16} \b                                                        # AWS
    | gh[pousr]_ [A-Za-z0-9]{36,255} \b | github_pat_ [A-Za-z0-9]{22} _ [A-Za-z0-9]{59} \b
    | gl (?: pat | ptt | dt | rt | soat | cbt | ft | imt | agent ) - [\w-]{20,300}
    | xox[abeprs] - [0-9] [A-Za-z0-9-]{10,300} | xapp-[0-9]-[A-Za-z0-9-]{20,300}                          # Slack
    | [sr]k_ (?: live | test ) _ [A-Za-z0-9]{16,255} \b | whsec_ [A-Za-z0-9+/]{32,64}                       # Stripe
    | AIza [\w-]{35} (?! [\w-] ) | ya29\. [\w.-]{20,1024} | GOCSPX- [\w-]{28} (?! [\w-] )                   # Google
    | sk- (?: proj - | svcacct - | admin - | ant-[a-z0-9]{1,8} - | or-v1- )? (?P<random> [\w-]{20,300} )        # OpenAI and alike
    | (?: hf_ | npm_ ) (?P<mixed> [A-Za-z0-9]{34,40} ) \b | pypi-AgE [\w-]{50,1024} | SG\. [\w-]{22} \. [\w-]{43} (?! [\w-] )
    | eyJ [\w-]{8,4096} \. eyJ [\w-]{8,16384} \. [\w-]{10,2048} )                                           # JSON web tokens""")
SLACK_HOOK = re.compile(r"(?a)hooks\.slack\.com/services/(T\w{6,14}/B\w{6,14}/\w{20,28})\b")
URL_PASSWORD = re.compile(r"://[^\s/:@\"'<>]{0,64}:([^\s/@\"'<>]{6,128})@(?=[\w\[])")
NAMES = tuple(regex.compile(name + r"""["'\]]{0,2}[ \t]{0,4}(?:=>|:=|=|:)[ \t]{0,4}(?:[bru]{1,2}(?=["']))?""") for name in (
    r"passw(?:or)?d", r"passphrase", r"(?<![a-z])pwd", r"(?<=[_-])pass(?![a-z])", r"secret(?:[_-]?(?:access|api|auth|token))?(?:[_-]?key)?",
    r"token(?:[_-]?secret)?", r"key(?<=(?:api|access|account|auth|private|encryption|signing|master|storage|service)[_-]?key)",
    r"credential"))
PASSWORDS = 4
"""The first of NAMES: theirs are chosen by people, and short."""
BEARER = regex.compile(r"\bbearer (?=\S{20})")
QUOTED = regex.compile(r"""(["'`])([^\s"'`\\]{8,512}+)\1""")
BARE = regex.compile(r"""([^\s"'`<>(){}\[\],;&\\]{8,256}+)(?=[\s"',;&<}]|\Z)""")
PLACEHOLDER = re.compile(r"(?i)^[$%<{/.]|^\w+\(|<\||://|x{4}|\*{3}|\.{3}|1234567|abcdef|qwert"
                         r"|example|sample|your|change|placeholder|dummy|redacted|pass|secret|token|test")


def _secrets(text: str) -> Iterator[Span]:
    if "PRIVATE KEY" in text:
        yield from (match.span() for match in PRIVATE_KEY.finditer(text) if KEY_MATERIAL.search(match[0]))
    for match in TOKEN.finditer(text):
        body = match["random"] or match["mixed"]
        if body is None or _is_random(body) or (match["mixed"] and _is_mixed(body)):
            yield match.span()
    if "hooks.slack" in text:
        yield from (match.span(1) for match in SLACK_HOOK.finditer(text))
    if "://" in text:
        yield from (match.span(1) for match in URL_PASSWORD.finditer(text) if DIGIT.search(match[1]) and not PLACEHOLDER.search(match[1]))
    yield from _assigned(text)


def _assigned(text: str) -> Iterator[Span]:
    lower = text.lower()
    if len(lower) != len(text):                            # the one letter that becomes two
        lower = text.replace("\u0130", "I").lower()
    for number, name in enumerate(NAMES):
        for match in name.finditer(lower):
            value = QUOTED.match(text, match.end())
            group = 2
            if not value:
                value, group = BARE.match(text, match.end()), 1
            if value and (_is_random(value[group]) or (number < PASSWORDS and _is_password(value[group]))):
                yield value.span(group)
    for match in BEARER.finditer(lower):
        value = BARE.match(text, match.end())
        if value and _is_random(value[1]):
            yield value.span(1)


LOWER, UPPER, DIGIT, SYMBOL = re.compile("[a-z]"), re.compile("[A-Z]"), re.compile("[0-9]"), re.compile("[^A-Za-z0-9_.:/-]")
SWITCH = re.compile("[0-9][A-Za-z]|[A-Za-z](?=[0-9])")
HEX = re.compile("[0-9a-f-]{32,}|[0-9A-F-]{32,}")


def _is_random(value: str) -> bool:
    """At least 16 characters of a generator: letters and digits that alternate, and nearly as many bits each as so few can have."""
    if len(value) < 16 or PLACEHOLDER.search(value) or not DIGIT.search(value):
        return False
    return (len(SWITCH.findall(value)) >= 3 or _is_mixed(value)) and _entropy(value) >= (3.0 if HEX.fullmatch(value) else 3.4)


def _is_mixed(value: str) -> bool:
    """Letters in no order of upper and lower case, as in words and names."""
    return len(re.findall("[a-z](?=[A-Z])|[A-Z](?=[A-Z][a-z])", value)) >= 5 and _entropy(value) >= 3.8


def _is_password(value: str) -> bool:
    """At least eight characters of three sorts, digits among them."""
    return (not PLACEHOLDER.search(value) and bool(DIGIT.search(value)) and _entropy(value) >= 2.5
            and sum(bool(sort.search(value)) for sort in (LOWER, UPPER, DIGIT, SYMBOL)) >= 3)


def _entropy(value: str) -> float:
    """Shannon's, in bits per character."""
    return -sum(count / len(value) * math.log2(count / len(value)) for count in Counter(value).values())


KINDS: dict[str, Callable[[str], Iterator[Span]]] = {"secret": _secrets, "email": _emails, "card": _cards, "ip": _ips, "phone": _phones}
"""In the order in which they are looked for: a token may hold what looks like a number of a card."""
