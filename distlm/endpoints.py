"""Endpoints by name: what they answer.

    print("".join(query("py", "def fib(n):")))
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distlm.errors import InputError, ServeError
from distlm.serve import client
from distlm.storage import Storage, read_json


def query(name: str, prompt: str, max_tokens: int | None = None, *, model: str | None = None, temperature: float = 0.0, chat: bool = False,
          storage: str | Path | Storage | None = None) -> Iterator[str]:
    """What an endpoint makes of `prompt`, or answers it in a chat, piece by piece. `model` is the name of one of its adapters. Raises
    InputError where there is no endpoint of that name, ServeError where it does not prove itself: then it is sent neither the key nor the
    prompt."""
    endpoint = _proven(name, storage)
    return client.query(endpoint["url"], _key(endpoint), prompt, max_tokens, model=model or endpoint.get("model"),
                        temperature=temperature, chat=chat)


def classify(name: str, texts: Sequence[str], *, storage: str | Path | Storage | None = None) -> list[dict[str, Any]]:
    """What the endpoint of a classifier says of each text: `label`, or where a text may have several `labels`, and `probabilities` by
    label; and whether the text was `truncated`. Raises as `query` does."""
    endpoint = _proven(name, storage)
    return client.classify(endpoint["url"], _key(endpoint), texts, model=endpoint.get("model"))


def serves_classifier(name: str, storage: str | Path | Storage | None = None) -> bool:
    """Whether an endpoint is a classifier's, by its record. Raises InputError where there is none of that name."""
    return bool(_endpoint(name, storage).get("classifier"))


def _endpoint(name: str, storage: str | Path | Storage | None) -> dict[str, Any]:
    path = Storage.given(storage).endpoint(name) / "endpoint.json"
    if not path.exists():
        raise InputError(f"there is no endpoint {name!r}", where=str(path.parent), remedy="`distlm runs` lists those that serve")
    return dict(read_json(path))


def _proven(name: str, storage: str | Path | Storage | None) -> dict[str, Any]:
    endpoint = _endpoint(name, storage)
    if not client.healthy(endpoint):
        raise ServeError("no endpoint answers there that knows the key", where=endpoint["url"],
                         remedy=f"`distlm status {name}` shows how it stands, `distlm run` or `submit` with its spec brings it up")
    return endpoint


def _key(endpoint: Mapping[str, Any]) -> str:
    return Path(endpoint["api_key_file"]).read_text().strip()
