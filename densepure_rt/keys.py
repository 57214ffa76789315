"""Secrets in files: what all noise of a run is keyed with, of the shards of one, or of a server."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

from densepure_rt.errors import EnvironmentFault, UsageError

SECRET_BYTES = 32


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def stored_key(file: Path) -> bytes | None:
    """The secret in a key file; None where there is none."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise EnvironmentFault(f"cannot read the key {file} ({error})") from error
    if not re.fullmatch("[0-9a-f]{64,}", text) or len(text) % 2:
        raise UsageError(f"{file} is no key: it must hold 64 hexadecimal digits or more")
    return bytes.fromhex(text)


def store_key(file: Path, secret: bytes) -> None:
    """Write a key file, readable by its owner alone, in place of what is there. Raises OSError."""
    written(file, secret).replace(file)


def shared_key(file: Path) -> bytes:
    """The secret in a key file, which is made where there is none: all who name the file get the same one."""
    found = stored_key(file)
    if found is None:
        try:
            new = written(file, new_secret())
            with contextlib.suppress(FileExistsError):  # somebody else was first
                os.link(new, file)
            new.unlink()
        except OSError as error:
            raise EnvironmentFault(f"cannot write the key {file} ({error.strerror})") from error
        found = stored_key(file)
    if found is None:
        raise EnvironmentFault(f"the key {file} was removed while it was made")
    return found


def written(file: Path, secret: bytes) -> Path:
    """A file beside it that no one else writes, holding the secret."""
    new = file.with_name(f"{file.name}.{secrets.token_hex(8)}.new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as key:
        key.write(secret.hex() + "\n")
        key.flush()
        os.fsync(descriptor)
    return new
