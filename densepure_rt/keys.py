"""Secrets in files: what all noise of a run is keyed with, of the shards of one, or of a server."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from densepure_rt import files, logs
from densepure_rt.errors import EnvironmentFault, UsageError

SECRET_BYTES = 32
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # what file systems without hard links answer


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def stored_key(file: Path) -> bytes | None:
    """The secret in a key file; None where there is none."""
    try:
        text = files.content(file, "key").decode("ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except files.UnfitFile as error:
        raise EnvironmentFault(f"cannot read the key {file} ({error.strerror}): name a file that holds it") from error
    except (OSError, ValueError) as error:
        raise EnvironmentFault(f"cannot read the key {file} ({error})") from error
    if not re.fullmatch("[0-9a-f]{64,}", text) or len(text) % 2:
        raise UsageError(f"{file} is no key: it must hold 64 hexadecimal digits or more")
    return bytes.fromhex(text)


def store_key(file: Path, secret: bytes) -> None:
    """Write a key file, readable by its owner alone, in place of what is there. Raises OSError."""
    with beside(file, secret) as new:
        new.replace(file)


def shared_key(file: Path) -> bytes:
    """The secret in a key file, which is made where there is none: all who name the file get the same one.

    Raises UsageError where it was retired, EnvironmentFault where it cannot be made.
    """
    if os.path.exists(retired(file)):  # which takes any name for an answer
        raise UsageError(
            f"the secret of {file} has been revealed and is now in {retired(file).name}, so that no more noise may be "
            f"drawn with it: name another key file"
        )
    found = stored_key(file)
    if found is None:
        try:
            make_key(file)
        except OSError as error:
            raise EnvironmentFault(f"cannot write the key {file} ({error.strerror})") from error
        found = stored_key(file)
    if found is None:
        raise EnvironmentFault(f"the key {file} was removed while it was made")
    warn_of_readers(file)
    return found


def make_key(file: Path) -> None:
    """Write a key file with a new secret, whole at once, unless somebody else was first. Raises OSError."""
    secret = new_secret()
    with beside(file, secret) as new, contextlib.suppress(FileExistsError):
        try:
            os.link(new, file)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            write_new(file, secret)  # who reads it at this very moment finds a part, which is no key


@contextmanager
def beside(file: Path, secret: bytes) -> Iterator[Path]:
    """A file beside it that no one else writes, holding the secret; gone when the block ends."""
    new = file.with_name(f"{file.name}.{secrets.token_hex(8)}.new")
    try:
        write_new(new, secret)
        yield new
    finally:
        new.unlink(missing_ok=True)


def warn_of_readers(file: Path) -> None:
    """Log a warning where others than its owner may read or write a key file."""
    with contextlib.suppress(OSError):
        if os.name == "posix" and (mode := file.stat().st_mode & 0o777) & 0o077:
            logs.say(f"others may read or write the key {file} (mode {mode:o}): chmod 600 {file}", logging.WARNING)


def retired(file: Path) -> Path:
    """The name of a key file once its secret is public."""
    return Path(f"{file}.revealed")


def retire(file: Path, secret: bytes) -> None:
    """Rename a key file whose secret is public, so that `shared_key` refuses it. Once is as good as twice.

    Raises UsageError when it holds another secret, EnvironmentFault when it cannot be renamed.
    """
    if secret not in (found := stored_key(file), stored_key(retired(file))):
        raise UsageError(f"{file} does not hold the secret of this run: name the key file that the run was keyed with")
    try:
        if found == secret:
            file.replace(retired(file))
    except OSError as error:
        raise EnvironmentFault(f"cannot rename the key {file} ({error.strerror}): remove it yourself") from error


def write_new(file: Path, secret: bytes) -> None:
    """Write a key file where there is nothing yet, readable by its owner alone. Raises OSError."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as key:
        key.write(secret.hex() + "\n")
        key.flush()
        os.fsync(descriptor)


class RotatingSecret:
    """A server's secret, replaced once it is `lifetime` seconds old. Called, it gives the one of now.

    Under one secret a wrong answer repeats, and whoever asks about r images finds about r * alpha wrong ones: so it
    should not last. It is as old as the one clock says that makes it older: the wall clock may be set back, the
    monotonic one stands still while the machine sleeps.

    Args:
        file: Where it is kept, made where there is none; a server that starts again goes on with it, and its age counts
            from when it was written, by the wall clock.
        lifetime: Seconds.
        public: A secret that never changes.
        now, elapsed: The wall clock and the monotonic one, in seconds.
    """

    def __init__(
        self,
        file: Path | None = None,
        lifetime: float = math.inf,
        public: bytes | None = None,
        now: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        if public is not None and (file is not None or lifetime < math.inf):
            raise UsageError("a public seed is neither kept nor replaced: leave `file` and `lifetime` out, or `public`")
        self._file, self._lifetime, self._now, self._elapsed = file, lifetime, now, elapsed
        self._lock = threading.Lock()
        self._secret = public or (new_secret() if file is None else shared_key(file))
        self._begin(0.0 if file is None else max(0.0, now() - file.stat().st_mtime))

    def _begin(self, age: float) -> None:
        """Count the secret's age on both clocks from now on. age: in seconds."""
        self._born, self._since = self._now() - age, self._elapsed() - age

    def __call__(self) -> bytes:
        with self._lock:
            if max(self._now() - self._born, self._elapsed() - self._since) >= self._lifetime:
                self._secret = new_secret()
                self._begin(0.0)
                self._keep()
            return self._secret

    def _keep(self) -> None:
        """A file that cannot be written leaves the old secret in it, which a restart would take up again."""
        try:
            if self._file is not None:
                store_key(self._file, self._secret)
        except OSError as error:
            logs.say(f"the new secret is not in {self._file} ({error.strerror}): repair that", logging.ERROR)
        else:
            logs.say("a new secret keys what is asked from now on")


def seeded_secret(seed: int) -> bytes:
    """The secret of a public seed: for reproduction, not against an adversary."""
    return hashlib.sha256(f"densepure-rt public seed {seed}".encode()).digest()


def commitment(secret: bytes) -> str:
    """Return what may be published before the first sample: the SHA-256 of the secret."""
    return hashlib.sha256(secret).hexdigest()
