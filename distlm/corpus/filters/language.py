"""Which language a text is in, by py3langid or by a fastText model of the user's."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from distlm.errors import InputError
from distlm.spec.curate import Language

SAMPLE_CHARS = 2000
"""The text's first characters, white space removed at their start: what py3langid takes per byte is too much for whole documents."""
LABEL = "__label__"
Detect = Callable[[str], tuple[str, float]]
"""Text to (language, confidence from 0 to 1)."""


def load_detector(rules: Language) -> Detect:
    """Raises InputError for a package or model that is missing, and for a language that the model does not know."""
    detect, known = _fasttext(rules.model) if rules.model else _py3langid()
    unknown = sorted(set(rules.keep) - known)
    if unknown:
        raise InputError(f"the model knows no language {', '.join(unknown)}", where="filter.language.keep",
                         remedy=f"it knows {' '.join(sorted(known))}")
    return lambda text: detect(text.lstrip()[:SAMPLE_CHARS])


@lru_cache(maxsize=1)
def _py3langid() -> tuple[Detect, frozenset[str]]:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise InputError("py3langid is not installed", where="filter.language", remedy="pip install distlm[text]") from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return identifier.classify, frozenset(identifier.labels)


@lru_cache(maxsize=1)
def _fasttext(path: str) -> tuple[Detect, frozenset[str]]:
    where = "filter.language.model"
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}", where=where, remedy="give a fastText model's file, or leave it out for py3langid")
    try:
        import fasttext
    except ImportError:
        raise InputError("fasttext is not installed", where=where, remedy="pip install fasttext, or leave the model out") from None
    try:
        model = fasttext.load_model(path)
    except ValueError as error:
        raise InputError(f"{path}: {error}", where=where, remedy="give a fastText model's file") from None

    def detect(text: str) -> tuple[str, float]:
        found = model.f.predict(text.replace("\n", " ") + "\n", 1, 0.0, "replace")  # model.predict fails with NumPy 2
        return (found[0][1].removeprefix(LABEL), min(1.0, found[0][0])) if found else ("", 0.0)

    return detect, frozenset(label.removeprefix(LABEL) for label in model.labels)
