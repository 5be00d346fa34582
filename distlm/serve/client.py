"""Ask an endpoint from Python.

    for piece in query(url, key, "def add(", max_tokens=32):
        print(piece, end="", flush=True)
"""

import contextlib
import hmac
import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from distlm.errors import InputError, ServeError
from distlm.serve.guard import proof, read_key

MODELS = "models"
"""In an endpoint's folder: the files that its replicas load, a folder for each version."""
ADAPTERS = "adapters"
"""In that of a version: a folder for each adapter."""
CUT = "the text is longer than the classifier's documents, and was cut as they were"
"""What to say where an answer is `truncated`."""


def query(url: str, api_key: str, prompt: str, max_tokens: int | None = None, *, model: str | None = None, chat: bool = False,
          temperature: float = 0.0, timeout_s: float = 600, **fields: Any) -> Iterator[str]:
    """The completion of `prompt`, piece by piece. `url` as in endpoint.json; `fields` are more fields of the request.

    Raises ServeError where the endpoint cannot be reached or refuses.
    """
    asked = {"prompt": prompt} if not chat else {"messages": [{"role": "user", "content": prompt}]}
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    with _asking(url, api_key, timeout_s) as (http, base):
        body = {"model": model or _first_model(http, base), **asked, **limit, "temperature": temperature, "stream": True, **fields}
        with http.stream("POST", f"{base}/{'chat/' if chat else ''}completions", json=body) as answer:
            _accept(answer, base)
            yield from _pieces(answer, base)


def classify(url: str, api_key: str, texts: Sequence[str], *, model: str | None = None, timeout_s: float = 600) -> list[dict[str, Any]]:
    """What a classifier says of each text: `label`, or where a text may have several `labels`, and the `probabilities` by label; and
    whether the text was `truncated`, as documents were.

    Raises ServeError where the endpoint cannot be reached or refuses.
    """
    with _asking(url, api_key, timeout_s) as (http, base):
        answer = http.post(f"{base}/classify", json={"model": model or _first_model(http, base), "input": list(texts)})
        _accept(answer, base)
        return [{**{key: one[key] for key in ("label", "labels", "probabilities")}, "truncated": bool(one.get("truncated"))}
                for one in answer.json()["data"]]


def healthy(endpoint: Mapping[str, Any]) -> bool:
    """Whether an endpoint answers and proves that it knows its key and serves its model: anybody may have taken its port since, so the key
    is not sent. `endpoint` holds url, api_key_file and model, as endpoint.json and the outputs of its job do."""
    try:
        key, nonce = read_key(Path(endpoint["api_key_file"])), secrets.token_hex(16)
        base = endpoint["url"].rstrip("/").removesuffix("/v1")
        answer = httpx.get(f"{base}/health", params={"nonce": nonce}, timeout=10, trust_env=False)
        wanted = proof(key, endpoint["model"], nonce)
        return answer.status_code == 200 and hmac.compare_digest(answer.json()["proof"].encode(), wanted.encode())
    except (httpx.HTTPError, InputError, ValueError, KeyError, TypeError, AttributeError):
        return False


def gone(endpoint: Mapping[str, Any]) -> bool:
    """Whether nobody listens where an endpoint did, which one that is only slow to answer does."""
    try:
        httpx.get(endpoint["url"], timeout=10, trust_env=False)
    except httpx.ConnectError:
        return True
    except (httpx.HTTPError, KeyError):
        pass
    return False


@contextlib.contextmanager
def _asking(url: str, api_key: str, timeout_s: float) -> Iterator[tuple[httpx.Client, str]]:
    """A client that sends the key, and the address before every path. Raises ServeError where nobody answers."""
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    with httpx.Client(headers={"Authorization": f"Bearer {api_key}"}, timeout=timeout_s, trust_env=False) as http:
        try:
            yield http, base
        except httpx.HTTPError as error:
            raise ServeError(f"the endpoint cannot be reached: {error}", where=base,
                             remedy="`distlm status` shows whether it runs") from None


def _first_model(http: httpx.Client, base: str) -> str:
    answer = http.get(f"{base}/models")
    _accept(answer, base)
    return str(answer.json()["data"][0]["id"])


def _pieces(answer: httpx.Response, base: str) -> Iterator[str]:
    for line in answer.iter_lines():
        data = line.removeprefix("data: ")
        if not line.startswith("data: ") or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise ServeError(event["error"]["message"], where=base)
        for choice in event["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            if text:
                yield text


def forget(folder: Path) -> None:
    """Remove from an endpoint's folder the record of what is down, and the files that its replicas loaded. Its key stays."""
    (folder / "endpoint.json").unlink(missing_ok=True)
    shutil.rmtree(folder / MODELS, ignore_errors=True)


def _accept(answer: httpx.Response, base: str) -> None:
    if answer.status_code == 200:
        return
    answer.read()
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:200]
    raise ServeError(f"{message} (status {answer.status_code})", where=base, cause="bad_input" if answer.status_code < 500 else "")
