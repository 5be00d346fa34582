"""What is said of a job is what is: an endpoint runs as long as it answers."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from distlm import jobs
from distlm.runs import RunFolder
from distlm.storage import Storage, write_json


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_an_endpoint_is_running_while_it_answers_and_lost_when_it_does_not(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    folder = RunFolder.create(storage.endpoint("py"), "kind: serve\n", {})
    with folder.running():
        pass
    server = HTTPServer(("127.0.0.1", 0), Healthy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    write_json(folder.path / "endpoint.json", {"url": f"http://127.0.0.1:{server.server_port}/v1"})
    job = jobs.locate("py", storage)
    assert (job.state, job.cause) == ("running", "") and str(server.server_port) in job.message
    server.shutdown()
    server.server_close()
    thread.join()
    job = jobs.locate("py", storage)
    assert (job.state, job.cause) == ("failed", "head_lost")
    (folder.path / "endpoint.json").unlink()
    folder.event("stopped", "user")
    assert jobs.locate("py", storage).state == "stopped"
