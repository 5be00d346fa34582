"""What a source may have of its own, beside the job's rules."""

import pytest

from distlm.errors import SpecError
from distlm.spec import load_spec
from distlm.spec.curate import Boilerplate
from distlm.spec.load import Loaded, dump
from distlm.spec.prepare import PrepareSpec


def load(source: object, **job: object) -> Loaded:
    return load_spec({"kind": "prepare", "name": "a", "sources": [{"path": "a", **source}], **job})  # type: ignore[dict-item]


def test_a_source_overrides_the_keys_that_it_gives_and_no_others():
    own = {"clean": {"min_chars": 7, "boilerplate": None}, "filter": {"rules": ["code"]}}
    loaded = load(own, clean={"min_chars": 3, "unicode": "NFKC", "boilerplate": {}}, filter={"min_words": 4, "rules": ["c4"]})
    spec = loaded.spec
    assert isinstance(spec, PrepareSpec) and spec.clean.boilerplate == Boilerplate()
    cleaning, filtering = spec.cleaning(spec.sources[0]), spec.filtering(spec.sources[0])
    assert (cleaning.min_chars, cleaning.unicode, cleaning.boilerplate) == (7, "NFKC", None)
    assert (filtering.rules, filtering.min_words) == (("code",), 4)
    assert dump(spec)["sources"][0]["clean"] == own["clean"] and load_spec(dump(spec)).spec == spec
    assert "sources.0.clean.unicode" not in loaded.origins


def test_what_a_source_cannot_have_is_refused_with_the_remedy():
    for source, message in (
            ({"weight": 1.5}, "sources.0.weight: 1.5 is above 1, and a corpus holds a document once; what is to be seen more than once "
                              "belongs to a training mixture: .* epochs in corpus.mix"),
            ({"weight": 0}, "sources.0.weight: 0: must be above 0"),
            ({"clean": {"boilerplate": {"min_documents": 3}}}, "sources.0.clean.boilerplate: lines are counted over the whole corpus"),
            ({"filter": {"min_word": 3}}, "sources.0.filter.min_word: unknown key; did you mean min_words")):
        with pytest.raises(SpecError, match=message):
            load(source)


@pytest.mark.parametrize(("keys", "message"), [
    ({"decontaminate": {"against": {"openai/gsm8k": "x"}}}, "decontaminate.against: .*'openai/gsm8k' is no name of a set"),
    ({"filter": {"min_words": 9, "max_words": 8}}, "filter.min_words: 9 is above max_words 8"),
    ({"filter": {"min_words": 9}, "sources": [{"path": "a", "filter": {"max_words": 8}}]}, "sources.0.filter.min_words: 9 is above"),
    ({"clean": {"min_chars": 9, "max_document_bytes": 8}}, "clean.min_chars: 9 is above max_document_bytes 8"),
    ({"clean": {"boilerplate": {"min_chars": 400}}}, "clean.boilerplate.min_chars: 400 is above max_chars 300")])
def test_what_would_reject_everything_or_names_no_file_is_refused(keys, message):
    with pytest.raises(SpecError, match=message):
        load_spec({"kind": "prepare", "name": "c", "sources": ["a"], **keys})
