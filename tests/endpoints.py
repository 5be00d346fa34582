"""What looks like an endpoint from outside."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from distlm.serve.guard import make_key, proof


@contextlib.contextmanager
def fake_endpoint(folder: Path, model: str) -> Iterator[dict[str, str]]:
    """A server that proves to know the key, which lies in `folder`, and to serve the model. Yields what endpoint.json would hold."""
    key = make_key(folder / "api_key")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, nonce = self.path.partition("?nonce=")
            self.send_response(200 if path == "/health" else 401)
            self.end_headers()
            if path == "/health":
                self.wfile.write(json.dumps({"proof": proof(key.read_text().strip(), model, nonce)}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield {"url": f"http://127.0.0.1:{server.server_port}/v1", "model": model, "api_key_file": str(key), "app": model}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def impostor() -> Iterator[tuple[str, list[str]]]:
    """Somebody else who listens at an address of ours, agrees to all, and keeps what it is told."""
    told: list[str] = []

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.append(f"{self.path} {self.headers}")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"status": "RUNNING", "proof": "", "data": [{"id": "py"}]}).encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Listener)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", told
    server.shutdown()
    server.server_close()
