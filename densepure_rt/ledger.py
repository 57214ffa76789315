"""The ledger: the durable record of a run, one SQLite file. Labels go in as samples are decided, records as images are.

During a run it alone is the truth; every other file of the run folder can be written again from it. What a killed
process had committed is there after it, and what it had not is drawn again, to the same labels: so that a resumed run
ends as an uninterrupted one would have.

Tables
    run       name, value              what the ledger belongs to: `identity_sha256`, `manifest_sha256`
    samples   idx, first, labels, ...  labels of samples first, first + 1, ... of an image that is under way
    images    place, idx, labels, ...  an image that is done: all its labels, its record and its timing, as JSON lines
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from densepure_rt.errors import CheckFailed, EnvironmentFault
from densepure_rt.runtime.reverse import Outcome
from densepure_rt.scheduling import Taken

NAME = "ledger.sqlite"
COMMIT_EVERY = 1.0  # seconds: what a killed process loses at most
BUSY = 5.0  # seconds to wait for another process that holds the file
MOST_LABELS = 10**8  # of an image, far beyond any n: no blob of a strange file may grow larger
TABLES = """
create table if not exists run (name text primary key, value text not null) strict;
create table if not exists samples (
    idx integer not null, first integer not null, labels blob not null,
    unet_calls integer not null, classifier_calls integer not null, primary key (idx, first)
) strict;
create table if not exists images (
    place integer primary key, idx integer not null unique, labels blob not null,
    record text not null, timing text not null
) strict;
"""
Labels = NDArray[np.int32]


class DoneImage(NamedTuple):
    """place: in the order of the run's images. record, timing: lines of JSON."""

    place: int
    idx: int
    labels: Labels
    record: str
    timing: str


def packed(labels: Sequence[int] | Labels) -> bytes:
    return zlib.compress(np.asarray(labels, "<i4").tobytes())


def unpacked(blob: bytes) -> Labels:
    """Raises CheckFailed when these are no labels."""
    try:
        unzip = zlib.decompressobj()
        raw = unzip.decompress(blob, 4 * MOST_LABELS)
        if not unzip.eof or unzip.unused_data or len(raw) % 4:
            raise ValueError("cut short, or too long")
    except (zlib.error, ValueError) as error:
        raise CheckFailed(f"labels in the ledger are damaged ({error})") from None
    return np.frombuffer(raw, "<i4").astype(np.int32)


DAMAGED = ("malformed", "not a database", "no such table", "no such column")  # in SQLite's words


@contextlib.contextmanager
def saying(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours: a damaged file, another process, a full disk, a folder that cannot be written."""
    try:
        yield
    except sqlite3.Error as error:
        if any(word in str(error) for word in DAMAGED):
            raise CheckFailed(f"{path} is damaged ({error}): the run cannot be read from it") from error
        if "locked" in str(error):
            raise EnvironmentFault(f"{path} is in use by another process: wait, or choose another --out") from error
        raise EnvironmentFault(
            f"cannot write {path} ({error}): free some space, or choose another folder with --out; what was written so "
            f"far is kept"
        ) from error


class Ledger:
    """The ledger of one run folder: a context manager. One process at a time may write it.

    Raises EnvironmentFault when it cannot be written or another process has it, CheckFailed when it is damaged.
    """

    def __init__(self, path: Path, read_only: bool = False) -> None:
        self.path, self.read_only = path, read_only
        self._pending: dict[int, list[Outcome]] = {}
        self._firsts: dict[int, int] = {}
        self._committed = time.monotonic()
        with saying(path):
            address = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            self._database = sqlite3.connect(address, uri=True, timeout=BUSY, isolation_level=None)
            if not read_only:
                self._database.executescript(
                    f"pragma locking_mode = exclusive; pragma journal_mode = wal; pragma synchronous = normal; {TABLES}"
                )
                self._database.execute("begin immediate").execute("commit")  # takes the lock, or raises

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Commit what is pending, if the disk still takes it, and leave a single file. Safe to call twice."""
        with contextlib.suppress(EnvironmentFault, CheckFailed, sqlite3.Error):
            self.commit()
            if not self.read_only:  # a single file can be read where nothing can be written
                self._database.execute("pragma journal_mode = delete")
        with contextlib.suppress(sqlite3.Error):
            self._database.close()

    def value(self, name: str) -> str | None:
        with saying(self.path):
            row = self._database.execute("select value from run where name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def set_value(self, name: str, value: str) -> None:
        with saying(self.path):
            self._database.execute("insert or replace into run values (?, ?)", (name, value))

    def taken(self, idx: int) -> Taken:
        """Of an image under way: the labels that were committed, up to the first gap."""
        with saying(self.path):
            rows = self._database.execute(
                "select first, labels, unet_calls, classifier_calls from samples where idx = ? order by first", (idx,)
            ).fetchall()
        parts, unets, classifiers, count = [np.empty(0, np.int32)], 0, 0, 0
        for first, blob, unet_calls, classifier_calls in rows:
            if first != count:
                break
            parts.append(unpacked(blob))
            count += len(parts[-1])
            unets, classifiers = unets + unet_calls, classifiers + classifier_calls
        self._firsts[idx] = count
        return Taken(np.concatenate(parts), unets, classifiers)

    def add(self, idx: int, outcome: Outcome) -> None:
        """The next sample of an image. It is durable within COMMIT_EVERY seconds of the next call."""
        self._pending.setdefault(idx, []).append(outcome)
        if time.monotonic() - self._committed >= COMMIT_EVERY:
            self.commit()

    def finish(self, place: int, idx: int, record: str, timing: str) -> None:
        """An image is done, by the labels that were added. Durable when this returns."""
        pending = [outcome.label for outcome in self._pending.pop(idx, ())]
        labels = np.concatenate([self.taken(idx).labels, np.array(pending, np.int32)])
        self._firsts.pop(idx, None)
        with saying(self.path), self._transaction():
            self._database.execute("delete from samples where idx = ?", (idx,))
            row = (place, idx, packed(labels), record, timing)
            self._database.execute("insert into images values (?, ?, ?, ?, ?)", row)

    def commit(self) -> None:
        """Write what is pending."""
        self._committed = time.monotonic()
        if not self._pending:
            return
        with saying(self.path), self._transaction():
            for idx, outcomes in self._pending.items():
                first = self._firsts.get(idx, 0)
                self._database.execute(
                    "insert or replace into samples values (?, ?, ?, ?, ?)",
                    (
                        idx,
                        first,
                        packed([outcome.label for outcome in outcomes]),
                        sum(outcome.unet_calls for outcome in outcomes),
                        sum(outcome.votes for outcome in outcomes),
                    ),
                )
                self._firsts[idx] = first + len(outcomes)
        self._pending.clear()

    def done(self) -> Iterator[DoneImage]:
        """The images that are done, in their order. Nothing may be written meanwhile."""
        with saying(self.path):
            for place, idx, blob, record, timing in self._database.execute("select * from images order by place"):
                yield DoneImage(place, idx, unpacked(blob), record, timing)

    def content_sha256(self) -> str:
        """Of everything that the ledger says, whatever its pages look like."""
        digest = hashlib.sha256()
        with saying(self.path):
            if (found := self._database.execute("pragma integrity_check").fetchone()[0]) != "ok":
                raise CheckFailed(f"{self.path} is damaged ({found})")
            for table, order in (("run", "name"), ("samples", "idx, first"), ("images", "place")):
                for row in self._database.execute(f"select * from {table} order by {order}"):
                    digest.update(repr(row).encode())
        return digest.hexdigest()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("begin")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("rollback")
            raise
        self._database.execute("commit")
