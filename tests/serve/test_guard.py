"""The API key's file and the 401."""

import stat
from pathlib import Path

import pytest

from distlm.errors import InputError
from distlm.serve.guard import make_key, read_key


def test_a_made_key_is_random_readable_by_its_owner_alone_and_kept(tmp_path: Path) -> None:
    path = make_key(tmp_path / "endpoint" / "api_key")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = read_key(path)
    assert len(key) > 40 and read_key(make_key(path)) == key and read_key(make_key(tmp_path / "other")) != key


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_key_that_others_can_use_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = make_key(tmp_path / "api_key")
    path.chmod(mode)
    with pytest.raises(InputError, match=f"mode {mode:03o}.*chmod 600"):
        read_key(path)


@pytest.mark.parametrize("text", ["", "short", "with a space in it all", "zwölf-und-noch-viel-mehr-zeichen"])
def test_a_weak_key_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "api_key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(InputError, match="16 ASCII"):
        read_key(path)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such API key file"):
        read_key(tmp_path / "none")
