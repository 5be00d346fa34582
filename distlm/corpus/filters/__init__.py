"""Which documents are good enough: `filter` of a prepare job.

    filters = Filters(spec.filter)
    filters.reasons(text, path="src/a.py")             # ["gopher_short_words"], or [] for a document that stays

One file per publication. A rule looks at a `Text` and yields the reasons for which it rejects the document; what it does not need,
since a reason was found already, is never computed. Texts are judged as they are and never changed.
"""

import importlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from distlm.corpus.filters.c4 import c4
from distlm.corpus.filters.code import code
from distlm.corpus.filters.fineweb import fineweb
from distlm.corpus.filters.gopher import gopher_quality, gopher_repetition
from distlm.corpus.filters.language import load_detector
from distlm.corpus.filters.text import Text
from distlm.corpus.trees import allows
from distlm.errors import CorpusError, InputError
from distlm.spec.curate import Filter

RULES: dict[str, Callable[[Text], Iterator[str]]] = {
    "gopher_quality": gopher_quality, "gopher_repetition": gopher_repetition, "c4": c4, "fineweb": fineweb, "code": code}
MAX_REASON_CHARS = 60


class Filters:
    """The filters of a spec, ready for any number of documents."""

    def __init__(self, rules: Filter) -> None:
        """Raises InputError for an extra that is not installed, a model or a function that is not there."""
        self._rules = rules
        self._licenses = frozenset(rules.license.keep) if rules.license else frozenset[str]()
        self._detect = load_detector(rules.language) if rules.language else None
        self._function = _load_function(rules.function) if rules.function else None
        self.languages, self.unwanted = Counter[str](), Counter[str]()
        """Texts by the language that was found, and those among them that the filter does not keep."""

    def reasons(self, text: str, *, path: str = "", meta: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
        """`judge`, in one list: the reason of a rejection alone, or all that is said of a document that stays."""
        dropped, said = self.judge(text, path=path, meta=meta)
        return [dropped] if dropped else said

    def judge(self, text: str, *, path: str = "", meta: Mapping[str, Any] = MappingProxyType({})) -> tuple[str, list[str]]:
        """(why the document is rejected, empty where it stays; what the rules say that only annotate and were asked until then).

        The order: licence, length, language, the rules as the spec has them, the user's function. `path` names the document, and its ending
        says whether it is Python; `meta` may hold its license. Raises CorpusError where the user's function fails.
        """
        said = list[str]()
        license = (("license", reason) for reason in self._license(meta.get("license")))
        for rule, reason in itertools.chain(license, self._reasons(Text(text, path))):
            if self._rules.mode == "drop" and rule not in self._rules.annotate:
                return reason, said
            said.append(reason)
        return "", said

    def _license(self, given: Any) -> Iterator[str]:
        """Several licences in a list hold all together."""
        rules = self._rules.license
        if rules is None:
            return
        found = [str(one) for one in (given if isinstance(given, list) else [given]) if one]
        if not found and not rules.keep_unknown:
            yield "no_license"
        elif not all(allows(one, self._licenses) for one in found):
            yield "license"

    def _reasons(self, text: Text) -> Iterator[tuple[str, str]]:
        """(rule, reason)."""
        rules = self._rules
        if rules.min_words is not None and len(text.words) < rules.min_words:
            yield "min_words", "too_few_words"
        if rules.max_words is not None and len(text.words) > rules.max_words:
            yield "max_words", "too_many_words"
        if rules.language and self._detect:
            language, confidence = self._detect(text.text)
            self.languages[language] += 1
            if language not in rules.language.keep or confidence < rules.language.min_confidence:
                self.unwanted[language] += 1
                yield "language", "language"
        for rule in rules.rules:
            yield from ((rule, reason) for reason in RULES[rule](text))
        if self._function:
            yield from (("function", reason) for reason in self._ask(self._function, text))

    def _ask(self, function: Callable[[str], Any], text: Text) -> Iterator[str]:
        where = f"{text.path or 'a document'}: filter.function: {self._rules.function}"
        try:
            reason = function(text.text)
        except (Exception, SystemExit) as error:           # to exit would end the worker, again and again
            raise CorpusError(f"the function failed: {type(error).__name__}: {error}", where=where, cause="user",
                              remedy="mend it, or let it return None for what it cannot judge") from error
        if reason is None:
            return
        name = re.sub(r"\W+", "_", reason).strip("_")[:MAX_REASON_CHARS] if isinstance(reason, str) else ""
        if not name:
            raise CorpusError(f"the function returned {reason!r:.100}", where=where, cause="user",
                              remedy="return None for a document that stays, else the reason: a word or a few")
        yield f"custom_{name}"


def _load_function(place: str) -> Callable[[str], Any]:
    module, name = place.split(":")
    where = "filter.function"
    try:
        function = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:               # the user's module runs here, and may fail in any way
        raise InputError(f"{module} cannot be imported: {type(error).__name__}: {error}", where=where,
                         remedy="install it, or put its folder into PYTHONPATH") from error
    if not callable(function):
        raise InputError(f"{module} has no function {name}", where=where, remedy="give module:name")
    return function
