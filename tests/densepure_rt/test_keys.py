from __future__ import annotations

import threading
from pathlib import Path

import pytest

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.keys import new_secret, shared_key, store_key, stored_key


def test_all_who_name_a_key_file_get_the_same_secret_however_they_come(tmp_path: Path) -> None:
    start, found = threading.Barrier(8), []

    def come() -> None:
        start.wait()
        found.append(shared_key(tmp_path / "noise.key"))

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["noise.key"]


def test_a_key_file_is_for_its_owner_alone_and_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    secret = new_secret()
    store_key(tmp_path / "noise.key", secret)
    assert stored_key(tmp_path / "noise.key") == secret
    assert (tmp_path / "noise.key").stat().st_mode & 0o777 == 0o600


def test_no_file_is_no_key_and_another_file_is_refused(tmp_path: Path) -> None:
    assert stored_key(tmp_path / "absent.key") is None
    for text in ("", "0" * 63, "0" * 65, "g" * 64, "é" * 64):
        (tmp_path / "other.key").write_text(text)
        with pytest.raises((UsageError, EnvironmentFault), match="key"):
            stored_key(tmp_path / "other.key")


def test_where_no_file_can_be_made_the_key_says_so(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot write the key"):
        shared_key(tmp_path / "no" / "such" / "folder.key")
