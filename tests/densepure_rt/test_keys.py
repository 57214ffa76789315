from __future__ import annotations

import errno
import math
import os
import shutil
import stat
import threading
import time
from pathlib import Path

import pytest

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.keys import RotatingSecret, make_key, new_secret, retire, shared_key, store_key, stored_key


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


def test_a_retired_key_file_draws_no_more_noise_and_is_not_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "noise.key"
    secret = shared_key(file)
    with pytest.raises(UsageError, match="does not hold the secret of this run"):
        retire(file, new_secret())
    for _ in range(2):
        retire(file, secret)
        assert [path.name for path in tmp_path.iterdir()] == ["noise.key.revealed"]
    store_key(file, secret)  # as from a backup
    for draw in (shared_key, RotatingSecret):
        with pytest.raises(UsageError, match=r"noise\.key has been revealed .*: name another key file"):
            draw(file)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_where_there_are_no_hard_links_the_first_one_still_makes_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    found = shared_key(tmp_path / "noise.key")
    make_key(tmp_path / "noise.key")  # as one that comes second
    assert shared_key(tmp_path / "noise.key") == found
    assert [(path.name, stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()] == [("noise.key", 0o600)]


def test_a_key_that_cannot_be_put_in_its_place_leaves_no_copy_of_the_secret(tmp_path: Path) -> None:
    (tmp_path / "noise.key").mkdir()
    with pytest.raises(IsADirectoryError):
        store_key(tmp_path / "noise.key", new_secret())
    assert [path.name for path in tmp_path.iterdir()] == ["noise.key"]


@pytest.mark.skipif(os.name != "posix", reason="there are no modes")
def test_a_key_that_others_may_read_is_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "noise.key"
    shared_key(file)
    assert caplog.messages == []
    for mode in (0o644, 0o620):
        file.chmod(mode)
        shared_key(file)
        (said,) = caplog.messages
        assert said == f"others may read or write the key {file} (mode {mode:o}): chmod 600 {file}"
        caplog.clear()


class Clock:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self) -> float:
        return self.seconds


def test_a_rotating_secret_is_another_one_after_its_lifetime_and_in_the_file_too(tmp_path: Path) -> None:
    file, clock = tmp_path / "secret.key", Clock(time.time())
    secret = RotatingSecret(file, lifetime=60, now=clock)
    first = secret()
    assert (stored_key(file), stat.S_IMODE(file.stat().st_mode)) == (first, 0o600)
    clock.seconds += 55
    assert secret() == first
    clock.seconds += 10
    second = secret()
    assert second != first
    assert (stored_key(file), stat.S_IMODE(file.stat().st_mode)) == (second, 0o600)
    assert RotatingSecret(file)() == second  # a server that starts again goes on with it
    assert first.hex() not in repr(vars(RotatingSecret)) + repr(secret)


@pytest.mark.parametrize("days", [-30, 0])
def test_a_secret_rotates_when_the_wall_clock_is_set_back_or_stands_still(tmp_path: Path, days: int) -> None:
    wall, elapsed = Clock(time.time()), Clock(1000.0)
    secret = RotatingSecret(tmp_path / "secret.key", lifetime=86_400, now=wall, elapsed=elapsed)
    first = secret()
    wall.seconds += days * 86_400
    elapsed.seconds += 86_399
    assert secret() == first
    elapsed.seconds += 1
    second = secret()
    assert second != first
    elapsed.seconds += 86_399
    assert secret() == second
    elapsed.seconds += 1
    assert secret() != second


def test_a_secret_rotates_after_a_sleep_in_which_the_monotonic_clock_stood_still() -> None:
    wall = Clock(time.time())
    secret = RotatingSecret(lifetime=60, now=wall, elapsed=Clock(5.0))
    first = secret()
    wall.seconds += 60
    assert secret() != first


def test_a_secret_that_was_written_in_the_future_is_new_and_the_age_of_an_old_one_counts_by_both_clocks(
    tmp_path: Path,
) -> None:
    file, wall, elapsed = tmp_path / "secret.key", Clock(time.time()), Clock(5.0)
    shared_key(file)
    for written, left in ((10_000, 60), (-50, 10)):
        os.utime(file, (wall.seconds + written,) * 2)
        secret = RotatingSecret(file, lifetime=60, now=wall, elapsed=elapsed)
        first = secret()
        elapsed.seconds += left - 1
        assert secret() == first
        elapsed.seconds += 2
        assert secret() != first


def test_the_age_of_a_secret_counts_from_when_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "secret.key"
    old = shared_key(file)
    assert RotatingSecret(file, lifetime=60, now=Clock(time.time() + 61))() != old


def test_without_a_file_a_secret_is_new_at_each_start_and_without_a_lifetime_it_stays() -> None:
    clock = Clock(0)
    secret = RotatingSecret(now=clock)
    first = secret()
    clock.seconds = 1e12
    assert secret() == first != RotatingSecret()()


def test_a_secret_rotates_where_its_file_cannot_be_written_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    clock = Clock(time.time())
    secret = RotatingSecret(folder / "secret.key", lifetime=60, now=clock)
    first = secret()
    shutil.rmtree(folder)
    clock.seconds += 61
    second = secret()
    assert second != first
    assert "the new secret is not in" in caplog.text
    assert second.hex() not in caplog.text


def test_a_public_secret_is_neither_kept_nor_replaced(tmp_path: Path) -> None:
    public = bytes(range(32))
    assert RotatingSecret(public=public)() == public
    for file, lifetime in ((tmp_path / "secret.key", math.inf), (None, 60.0)):
        with pytest.raises(UsageError, match="neither kept nor replaced"):
            RotatingSecret(file, lifetime, public)
    assert not (tmp_path / "secret.key").exists()
