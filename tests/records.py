"""A progress that keeps what it is given."""

from typing import Any

from distlm.progress import Progress


class Records(Progress):
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def show(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    @property
    def notes(self) -> list[str]:
        return [record["text"] for record in self.records if record["distlm"] == "note"]

    @property
    def text(self) -> str:
        return "\n".join(self.notes)
