"""How a classifier reads texts: as the documents that it was trained on were made of theirs, which its export tells."""

from dataclasses import dataclass
from pathlib import Path

from distlm.errors import InputError
from distlm.spec.curate import Clean
from distlm.storage import read_json
from distlm.text.clean import clean


@dataclass(frozen=True)
class Reading:
    """What a classifier's documents were made by of texts."""

    clean: Clean | None = None
    cut_tokens: int | None = None
    """Tokens to which longer documents were cut; None where there were none."""

    def cleaned(self, text: str) -> str:
        return clean(text, self.clean).text if self.clean else text


def recorded_reading(folder: Path) -> Reading:
    """As the export's distlm.json tells. Raises InputError for what are no such rules, and where they need a library that is not
    installed."""
    told = folder / "distlm.json"
    record = read_json(told) if told.is_file() else {}
    rules, cut = record.get("clean"), record.get("cut_tokens")
    if cut is not None and (type(cut) is not int or cut < 1):
        raise InputError(f"cut_tokens: {cut!r} is no number of tokens", where=str(told), remedy="copy the export again, or leave it out")
    try:
        found = None if rules is None else Clean.model_validate(rules)
    except ValueError:
        raise InputError(f"clean: {rules} are no rules of cleaning", where=str(told),
                         remedy="copy the export again, or leave clean out") from None
    if found:
        clean("é", found)                                  # not ASCII: that would need no library
    return Reading(found, cut)
