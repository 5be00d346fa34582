"""An endpoint proves itself before it is told a key or a prompt."""

from pathlib import Path

import pytest

from distlm import jobs
from distlm.endpoints import query
from distlm.errors import ServeError
from distlm.runs import RunFolder
from distlm.serve.client import healthy
from distlm.serve.guard import make_key, proof
from distlm.storage import Storage, write_json
from tests import endpoints
from tests.endpoints import fake_endpoint, impostor


def test_whoever_has_taken_an_endpoints_port_is_not_told_its_key(tmp_path: Path) -> None:
    folder = RunFolder(Storage(tmp_path).endpoint("py"))
    folder.event("succeeded", "completed")
    key = make_key(folder.path / "api_key")
    with impostor() as (url, told):
        write_json(folder.path / "endpoint.json", {"url": f"{url}/v1", "model": "py", "api_key_file": str(key), "app": "py"})
        job = jobs.locate("py", tmp_path)
        with pytest.raises(ServeError, match="no endpoint answers there that knows the key"):
            next(query("py", "secret prompt", storage=tmp_path))
    assert (job.state, job.cause) == ("failed", "head_lost") and told
    assert not [text for text in told if key.read_text().strip() in text or "Authorization" in text or "secret" in text]


def test_a_proof_that_was_overheard_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def overheard(key: str, model: str, nonce: str) -> str:
        asked.append(nonce)
        return proof(key, model, asked[0])

    monkeypatch.setattr(endpoints, "proof", overheard)
    with fake_endpoint(tmp_path, "py") as record:
        assert [healthy(record) for _ in range(3)] == [True, False, False]
    assert len(set(asked)) == 3
