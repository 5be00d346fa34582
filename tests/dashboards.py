"""A dashboard that says of jobs what it is told to, and jobs that were sent to one."""

import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from distlm.runs import RunFolder
from distlm.storage import Storage


@contextlib.contextmanager
def dashboard(asked: list[str] | None = None, **jobs_: str) -> Iterator[str]:
    """What answers as Ray's job API does: submission -> status; 404 for others. What is asked of it by POST goes into `asked`."""
    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = jobs_.get(self.path.split("/")[-1].replace("-", "_"))
            self.send_response(200 if status else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"status": status, "message": "no luck"}).encode())

        def do_POST(self) -> None:
            (asked if asked is not None else []).append(self.path)
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def queued(tmp_path: Path, url: str) -> RunFolder:
    folder = RunFolder(Storage(tmp_path).run("x"))
    folder.event("queued", submission="train-x-1", dashboard=url)
    return folder


def elsewhere(folder: RunFolder, **more: Any) -> None:
    """The journal of a job whose driver began on another host."""
    folder.event("starting", **more)
    events = folder.events()
    events[-1]["owner"]["host"] = "elsewhere"
    (folder.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
