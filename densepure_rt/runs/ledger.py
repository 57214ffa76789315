"""The ledger: the durable record of a run, one SQLite file. Labels go in as samples are decided, records as images are.

During a run it alone is the truth; every other file of the run folder can be written again from it. What a killed
process had committed is there after it, and what it had not is drawn again, to the same labels: so that a resumed run
ends as an uninterrupted one would have.

A ledger may come from somebody else. Its schema must be the one below, to the letter, before anything is read: a view
or a trigger is a program that SQLite would run. Labels unpack to as many as they are said to be.

Tables
    run       name, value              what the ledger belongs to: `identity_sha256`
    samples   idx, first, labels, ...  labels of samples first, first + 1, ... of an image that is under way
    images    place, idx, labels, ...  an image that is done: all its labels, its record and its timing, as JSON lines
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from densepure_rt import files
from densepure_rt.errors import CheckFailed, EnvironmentFault
from densepure_rt.json_files import parsed
from densepure_rt.runs.records import TimingRecord
from densepure_rt.runtime.reverse import Outcome
from densepure_rt.smoothing.scheduling import SavedLabels

NAME = "ledger.sqlite"
COMMIT_EVERY = 1.0  # seconds: what a killed process loses at most
BUSY = 5.0  # seconds to wait for another process that holds the file
BESIDE = ("-wal", "-shm", "-journal")  # what SQLite keeps next to it, by the ends of their names
MOST_LABELS = 10**8  # of an image, far beyond any n
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
    """place: in the order of the run's images. blob: its labels, packed. record, timing: lines of JSON.

    most_labels: that an image of the run can have, whatever its timing says.
    """

    place: int
    idx: int
    blob: bytes
    record: str
    timing: str
    most_labels: int = MOST_LABELS

    def labels(self) -> Labels:
        """Unpack its labels. Raises CheckFailed when these are none, or more than its timing says or the run allows."""
        said = parsed(TimingRecord, self.timing, f"the timing of image {self.idx}").samples
        return unpacked(self.blob, min(said, self.most_labels))


def packed(labels: Sequence[int] | Labels) -> bytes:
    return zlib.compress(np.asarray(labels, "<i4").tobytes())


def unpacked(blob: bytes, most: int = MOST_LABELS) -> Labels:
    """Unpack `most` labels or fewer. Raises CheckFailed when these are no labels, or are more."""
    most = min(most, MOST_LABELS)
    try:
        unzip = zlib.decompressobj()
        raw = unzip.decompress(blob, 4 * most + 1)
        if len(raw) > 4 * most:
            raise ValueError(f"more than the {most:,} that there can be")
        if not unzip.eof or unzip.unused_data or len(raw) % 4:
            raise ValueError("cut short, or too long")
    except (zlib.error, ValueError) as error:
        raise CheckFailed(f"labels in the ledger are damaged ({error})") from None
    return np.frombuffer(raw, "<i4").astype(np.int32, copy=False)


def schema(database: sqlite3.Connection) -> set[tuple[str, str, str, str | None]]:
    """List what a database declares: (type, name, table, SQL) each. SQLite wrote the indices without SQL itself."""
    return set(database.execute("select type, name, tbl_name, sql from sqlite_master"))


def own_schema() -> set[tuple[str, str, str, str | None]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.executescript(TABLES)
        return schema(database)


DAMAGED = ("malformed", "Could not decode", "not a database", "no such table", "no such column")  # in SQLite's words


@contextlib.contextmanager
def translating_sqlite_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours: a damaged file, another process, a full disk, a folder that cannot be written."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CheckFailed(f"{path} is damaged (it holds text that is none): the run cannot be read from it") from error
    except sqlite3.Error as error:
        if any(word in str(error) for word in DAMAGED):
            raise CheckFailed(f"{path} is damaged ({error}): the run cannot be read from it") from error
        if "locked" in str(error):
            raise EnvironmentFault(
                f"{path} is in use by another process: wait for it, or choose another folder"
            ) from error
        raise EnvironmentFault(
            f"cannot write or read {path} ({error}): free some space, or choose another folder with `out`; what was "
            f"written so far is kept"
        ) from error


def identity_of(path: Path) -> tuple[int, int] | None:
    """Return a file's device and inode, which no other name changes; None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def refuse_unfit(path: Path) -> None:
    """Raise EnvironmentFault where the ledger, or what SQLite keeps beside it, is no regular file: a pipe may hang.

    They are not opened here: to close a file gives up all locks that the process has on it.
    """
    for file in (path, *(path.with_name(path.name + end) for end in BESIDE)):
        try:
            files.check(file, "ledger")
        except files.UnfitFile as error:
            raise EnvironmentFault(f"cannot read {file} ({error.strerror}): move it away") from error
        except OSError:
            continue  # it is not there, or SQLite says what is wrong


@dataclass
class Pending:
    """Samples of an image that are not committed: first, first + 1, ..."""

    first: int
    outcomes: list[Outcome] = field(default_factory=list)


class Ledger(contextlib.AbstractContextManager["Ledger"]):
    """The ledger of one run folder: a context manager. One process at a time may write it.

    Ctrl-C may come between any two steps: a commit that is repeated writes the same rows again.

    most_labels: of an image, at most. Raises EnvironmentFault when it cannot be written or another process
    has it, CheckFailed when it is damaged or is no ledger of this program.
    """

    def __init__(self, path: Path, read_only: bool = False, most_labels: int = MOST_LABELS) -> None:
        self.path, self.read_only, self.most_labels = path, read_only, most_labels
        self._pending: dict[int, Pending] = {}
        self._committed = time.monotonic()
        refuse_unfit(path)
        with translating_sqlite_errors(path):
            address = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
            if not read_only and path.exists():  # judged before the pragmas below write to it
                with contextlib.closing(sqlite3.connect(address, uri=True, timeout=BUSY)) as database:
                    database.execute("pragma trusted_schema = off")
                    self._refuse_foreign(database)
            self._database = sqlite3.connect(address, uri=True, timeout=BUSY, isolation_level=None)
            try:
                self._open()
            except BaseException:
                self._database.close()
                raise

    def _open(self) -> None:
        self._database.execute("pragma trusted_schema = off")
        if self.read_only:
            self._database.execute("pragma query_only = on")
            self._refuse_foreign(self._database)
            return
        self._database.executescript(
            "pragma locking_mode = exclusive; pragma journal_mode = wal; pragma synchronous = normal"
        )
        with self._transaction():  # takes the lock, or raises
            self._refuse_foreign(self._database)
        self._database.executescript(TABLES)
        self._file = identity_of(self.path)

    def _refuse_foreign(self, database: sqlite3.Connection) -> None:
        """Raise CheckFailed when the schema has anything that is not ours: a view and a trigger run when it is read."""
        if strange := schema(database) - own_schema():
            kind, name, *_ = max(strange, key=str)  # view, trigger, table, index
            raise CheckFailed(
                f"{self.path} is no ledger of this program: it declares the {kind} {name!r} otherwise than one, which "
                f"could do anything, so it was not read; get the folder again from where it was made"
            )

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Commit what is pending, if the disk still takes it, and leave a single file. Safe to call twice."""
        with contextlib.suppress(EnvironmentFault, CheckFailed, sqlite3.Error):
            self.commit()
            if not self.read_only:  # a single file can be read where nothing can be written
                self._database.execute("pragma journal_mode = delete")
        with contextlib.suppress(sqlite3.Error):
            self._database.close()

    def settle(self) -> None:
        """Commit, and forget what memory holds: what is read from now on is what the file says.

        Raises CheckFailed when the file that was written is not the one of that name any more.
        """
        self.commit()
        if identity_of(self.path) != self._file:
            raise CheckFailed(
                f"{self.path} was removed or replaced while the run wrote to it, and its labels are lost: certify "
                f"again, into another folder with `out`"
            )
        with translating_sqlite_errors(self.path):
            self._database.execute("pragma journal_mode = delete")
            self._database.execute("pragma shrink_memory")

    @property
    def empty(self) -> bool:
        """Return whether nothing has been sampled."""
        with translating_sqlite_errors(self.path):
            query = "select exists (select 1 from samples) or exists (select 1 from images)"
            return not self._database.execute(query).fetchone()[0]

    @property
    def count(self) -> int:
        """Count the images that are done."""
        return sum(1 for _ in self._ascending("select place from images order by place"))

    def value(self, name: str) -> str | None:
        with translating_sqlite_errors(self.path):
            row = self._database.execute("select value from run where name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def set_value(self, name: str, value: str) -> None:
        with translating_sqlite_errors(self.path):
            self._database.execute("insert or replace into run values (?, ?)", (name, value))

    def saved(self, idx: int) -> SavedLabels:
        """Return the committed labels of an image under way, up to the first gap; those beyond one are dropped."""
        query = "select first, labels, unet_calls, classifier_calls from samples where idx = ? order by first"
        parts, unets, classifiers, count = [np.empty(0, np.int32)], 0, 0, 0
        for first, blob, unet_calls, classifier_calls in self._ascending(query, idx):
            if first != count:
                break
            parts.append(unpacked(blob, self.most_labels - count))
            count += len(parts[-1])
            unets, classifiers = unets + unet_calls, classifiers + classifier_calls
        if not self.read_only:
            with translating_sqlite_errors(self.path), self._transaction():
                self._database.execute("delete from samples where idx = ? and first >= ?", (idx, count))
            self._pending[idx] = Pending(count)
        return SavedLabels(np.concatenate(parts), unets, classifiers)

    def add(self, idx: int, outcome: Outcome) -> None:
        """The next sample of an image. A killed process loses COMMIT_EVERY seconds of them at most."""
        self._pending.setdefault(idx, Pending(0)).outcomes.append(outcome)
        if time.monotonic() - self._committed >= COMMIT_EVERY:
            self.commit()

    def finish(self, place: int, idx: int, samples: int, record: str, timing: str) -> None:
        """An image is done, by the `samples` labels that were added. A process that is killed now does not lose it."""
        self.commit()
        labels = self.saved(idx).labels
        if len(labels) != samples:
            raise CheckFailed(f"{self.path} has {len(labels)} labels of image {idx}, which {samples} decided")
        with translating_sqlite_errors(self.path), self._transaction():
            self._database.execute("delete from samples where idx = ?", (idx,))
            row = (place, idx, packed(labels), record, timing)
            self._database.execute("insert into images values (?, ?, ?, ?, ?)", row)
        self._pending.pop(idx, None)

    def take_over(self, images: Iterable[DoneImage]) -> None:
        """Images that are done in other ledgers: all of them, or after an error none."""
        rows = ((image.place, image.idx, packed(image.labels()), image.record, image.timing) for image in images)
        with translating_sqlite_errors(self.path), self._transaction():
            self._database.executemany("insert into images values (?, ?, ?, ?, ?)", rows)

    def commit(self) -> None:
        """Write what is pending."""
        self._committed = time.monotonic()
        rows = [
            (
                idx,
                pending.first,
                packed([outcome.label for outcome in pending.outcomes]),
                sum(outcome.unet_calls for outcome in pending.outcomes),
                sum(outcome.votes for outcome in pending.outcomes),
            )
            for idx, pending in self._pending.items()
            if pending.outcomes
        ]
        if not rows:
            return
        with translating_sqlite_errors(self.path), self._transaction():
            self._database.executemany("insert or replace into samples values (?, ?, ?, ?, ?)", rows)
        self._pending = {  # one step: before it, a repeated commit replaces the very rows; after it, nothing is pending
            idx: Pending(pending.first + len(pending.outcomes)) for idx, pending in self._pending.items()
        }

    def done(self) -> Iterator[DoneImage]:
        """The images that are done, in their order. Nothing may be written meanwhile."""
        for row in self._ascending("select place, idx, labels, record, timing from images order by place"):
            if tuple(map(type, row)) != (int, int, bytes, str, str):
                raise CheckFailed(f"{self.path} is damaged: an image has fields of other types")
            yield DoneImage(*row)._replace(most_labels=self.most_labels)

    def _ascending(self, query: str, *values: int) -> Iterator[tuple[Any, ...]]:
        """Rows whose first column ascends. Raises CheckFailed where it does not: damaged pages can go in circles."""
        last = None
        with translating_sqlite_errors(self.path):
            for row in self._database.execute(query, values):
                if not isinstance(row[0], int) or (last is not None and row[0] <= last):
                    raise CheckFailed(f"{self.path} is damaged: {row[0]!r} follows {last} where numbers ascend")
                last = row[0]
                yield row

    def content_sha256(self) -> str:
        """Hash everything that the ledger says, whatever its pages look like."""
        digest = hashlib.sha256()
        with translating_sqlite_errors(self.path):
            if (found := self._database.execute("pragma integrity_check").fetchone()[0]) != "ok":
                raise CheckFailed(f"{self.path} is damaged ({found})")
            for table, order in (("run", "name"), ("samples", "idx, first"), ("images", "place")):
                for row in self._database.execute(f"select * from {table} order by {order}"):
                    digest.update(repr(row).encode())
        return digest.hexdigest()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of it, or, after an error or Ctrl-C wherever it comes, nothing."""
        try:
            self._database.execute("begin immediate")
            yield
            self._database.execute("commit")
        finally:
            if self._database.in_transaction:
                self._database.execute("rollback")
