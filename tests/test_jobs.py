"""What is said of a job is what is: an endpoint runs as long as it answers."""

from pathlib import Path

from distlm import jobs
from distlm.runs import RunFolder
from distlm.storage import Storage, write_json
from tests.endpoints import fake_endpoint


def test_an_endpoint_is_running_while_it_answers_and_lost_when_it_does_not(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    folder = RunFolder.create(storage.endpoint("py"), "kind: serve\n", {})
    with folder.running():
        pass
    with fake_endpoint(folder.path, "py") as record:
        write_json(folder.path / "endpoint.json", record)
        job = jobs.locate("py", storage)
        assert (job.state, job.cause) == ("running", "") and record["url"] in job.message
        write_json(folder.path / "endpoint.json", {**record, "model": "before"})
        assert jobs.locate("py", storage).state == "failed", "another endpoint has the port now"
    job = jobs.locate("py", storage)
    assert (job.state, job.cause) == ("failed", "head_lost")
    (folder.path / "endpoint.json").unlink()
    folder.event("stopped", "user")
    assert jobs.locate("py", storage).state == "stopped"
