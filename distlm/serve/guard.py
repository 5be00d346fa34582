"""The API key: Ray Serve has no authentication, so the application asks for it itself."""

import contextlib
import hmac
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from distlm.errors import InputError
from distlm.storage import writing

OPEN_PATHS = ("/health",)
"""What answers without a key: load balancers ask here, and learn nothing but yes or no; our own clients, whether the key is known there."""


def make_key(path: Path) -> Path:
    """Write a new random key to `path`, readable by its owner alone; a key that is there stays."""
    with writing(path), contextlib.suppress(FileExistsError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(f"sk-{secrets.token_urlsafe(32)}\n")
    return path


def read_key(path: Path) -> str:
    """The key in a file that nobody but its owner can read. Raises InputError."""
    try:
        handle = os.open(path, os.O_RDONLY)
        with os.fdopen(handle) as file:
            mode = stat.S_IMODE(os.fstat(handle).st_mode)
            key = file.read(4096).strip()
    except FileNotFoundError:
        raise InputError("there is no such API key file", where=str(path), remedy="leave api_key_file out and one is made") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the API key file cannot be read: {error}", where=str(path)) from None
    if mode & 0o077:
        raise InputError(f"the API key file has mode {mode:03o}, others than its owner can use it", where=str(path),
                         remedy=f"chmod 600 {path}")
    if len(key) < 16 or not key.isascii() or any(c.isspace() for c in key):
        raise InputError("the API key must be one line of at least 16 ASCII characters without spaces", where=str(path),
                         remedy="leave api_key_file out and one is made")
    return key


def proof(key: str, model: str, nonce: str) -> str:
    """What /health answers to a nonce: that whoever listens knows the key and serves this model. The key itself need not be sent to learn
    that (HMAC, RFC 2104), since after a crash anybody may listen at an address that is on record."""
    return hmac.new(key.encode(), f"distlm endpoint\n{model}\n{nonce}".encode(), "sha256").hexdigest()


class Guard:
    """ASGI middleware: 401 to requests without `Authorization: Bearer <key>`."""

    def __init__(self, app: Any, key: str) -> None:
        self.app, self._key = app, key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "lifespan" or path in OPEN_PATHS or self._admits(scope):
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = json.dumps({"error": {"message": "the API key is missing or wrong; send it as `Authorization: Bearer <key>`",
                                     "type": "authentication_error", "param": None, "code": "invalid_api_key"}}).encode()
        await send({"type": "http.response.start", "status": 401, "headers": [
            (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"www-authenticate", b"Bearer")]})
        await send({"type": "http.response.body", "body": body})

    def _admits(self, scope: Any) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and scheme.lower() == b"bearer"
