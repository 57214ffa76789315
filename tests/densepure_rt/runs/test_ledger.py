from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densepure_rt.errors import CheckFailed, DensePureError, EnvironmentFault
from densepure_rt.json_files import line
from densepure_rt.runs.ledger import DoneImage, Ledger, packed, unpacked
from densepure_rt.runs.records import TimingRecord
from densepure_rt.runtime.reverse import Outcome


def outcome(label: int, sample: int = 0) -> Outcome:
    return Outcome(image=0, sample=sample, label=label, votes=3, unet_calls=4)


def timing(samples: int, idx: int = 0) -> str:
    return line(TimingRecord(idx, samples, 4 * samples, 3 * samples, 0, 0.5))


@given(st.lists(st.integers(-1, 2**31 - 1)))
def test_labels_are_read_as_they_were_written(labels: list[int]) -> None:
    assert unpacked(packed(labels)).tolist() == labels


@given(st.binary(max_size=64) | st.binary(max_size=64).map(zlib.compress))
def test_bytes_of_any_kind_are_labels_or_one_clear_error(blob: bytes) -> None:
    try:
        labels = unpacked(blob)
    except CheckFailed:
        return
    assert unpacked(packed(labels)).tolist() == labels.tolist()


def test_no_more_labels_are_unpacked_than_are_said_to_be_there() -> None:
    assert unpacked(packed([1, 2, 3]), 3).tolist() == [1, 2, 3]
    with pytest.raises(CheckFailed, match="more than the 2"):
        unpacked(packed([1, 2, 3]), 2)
    with pytest.raises(CheckFailed, match="more than the 64"):
        DoneImage(0, 5, zlib.compress(bytes(4 * 10**8), 1), "", timing(64, idx=5)).labels()


def test_a_blob_that_unpacks_without_end_is_refused() -> None:
    bomb = zlib.compress(bytes(10**9), 1)
    with pytest.raises(CheckFailed, match="damaged"):
        unpacked(bomb)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 9)), max_size=60), st.sets(st.integers(0, 59)))
def test_labels_come_back_in_order_whenever_they_are_committed(
    tmp_path_factory: pytest.TempPathFactory, labels: list[tuple[int, int]], commits: set[int]
) -> None:
    """Of three images at once; the ledger is left and opened again at some of the commits."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    ledger = Ledger(path)
    for place, (idx, label) in enumerate(labels):
        ledger.add(idx, outcome(label))
        if place in commits:
            ledger.commit()
            if place % 2:
                ledger.close()
                ledger = Ledger(path)
                for each in range(3):
                    ledger.saved(each)  # as a run that goes on asks for what is there
    ledger.close()
    with Ledger(path, read_only=True) as found:
        for idx in range(3):
            expected = [label for image, label in labels if image == idx]
            taken = found.saved(idx)
            assert taken.labels.tolist() == expected
            assert (taken.unet_calls, taken.classifier_calls) == (4 * len(expected), 3 * len(expected))


def test_an_image_that_is_done_keeps_all_its_labels_in_one_place(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        for label in (3, -1, 3):
            ledger.add(7, outcome(label))
        ledger.commit()
        ledger.add(7, outcome(4))
        ledger.finish(0, 7, 4, "record\n", timing(4))
        (done,) = ledger.done()
        assert (done.place, done.idx, done.labels().tolist(), done.record) == (0, 7, [3, -1, 3, 4], "record\n")
        assert ledger.saved(7).labels.tolist() == []


def test_what_a_killed_process_had_committed_is_there(tmp_path: Path) -> None:
    """The process leaves without closing anything."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from densepure_rt.runs.ledger import Ledger; from densepure_rt.runtime.reverse import Outcome\n"
        "ledger = Ledger(Path(sys.argv[1]))\n"
        "for label in (1, 2, 3): ledger.add(5, Outcome(0, 0, label, 1, 1))\n"
        "ledger.commit(); ledger.add(5, Outcome(0, 0, 4, 1, 1)); os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "l")], timeout=60, check=False)
    assert done.returncode == 9
    with Ledger(tmp_path / "l") as ledger:
        assert ledger.saved(5).labels.tolist() == [1, 2, 3]


class CtrlC:
    """Raises KeyboardInterrupt before the step number `at` of what is traced: a line of the ledger's module."""

    def __init__(self, at: int) -> None:
        self.at, self.steps = at, 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> CtrlC | None:
        if not frame.f_code.co_filename.endswith("ledger.py"):
            return None
        if event == "line":
            self.steps += 1
            if self.steps == self.at:
                raise KeyboardInterrupt
        return self


def test_ctrl_c_before_any_step_of_a_commit_or_an_end_doubles_and_loses_no_label(tmp_path: Path) -> None:
    """What was committed before it is there once, in its place, and what comes later follows it."""
    interrupted = 0
    for at in range(1, 400):
        path = tmp_path / f"{at}.sqlite"
        ledger = Ledger(path)
        for label in range(40):
            ledger.add(3, outcome(label % 10))
        ledger.commit()
        for label in range(40, 60):
            ledger.add(3, outcome(label % 10))
        trace = CtrlC(at)
        sys.settrace(trace)
        try:
            ledger.commit()
            ledger.add(3, outcome(0))
            ledger.finish(0, 3, 61, "record", timing(61))
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        ledger.close()
        with Ledger(path) as again:
            done = list(again.done())
            found = done[0].labels().tolist() if done else again.saved(3).labels.tolist()
            assert found == [label % 10 for label in range(len(found))], at
            assert len(found) == 61 if done else 40 <= len(found) <= 61
            if not done:
                for label in range(len(found), 70):
                    again.add(3, outcome(label % 10))
                again.finish(0, 3, 70, "record", timing(70))
        if trace.steps < at:
            break
    assert 20 < interrupted < 399


def test_labels_beyond_a_gap_are_dropped(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        for label in (1, 2, 3):
            ledger.add(5, outcome(label))
        ledger.commit()
    with sqlite3.connect(tmp_path / "l") as database:
        database.execute("update samples set first = 40")
        database.execute("insert into samples values (5, 0, ?, 1, 1)", (packed([7, 8]),))
    database.close()
    with Ledger(tmp_path / "l") as ledger:
        assert ledger.saved(5).labels.tolist() == [7, 8]
        ledger.add(5, outcome(9))
        ledger.finish(0, 5, 3, "record", timing(3))
        assert next(ledger.done()).labels().tolist() == [7, 8, 9]


def test_an_image_whose_labels_are_not_all_there_is_not_done(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l") as ledger:
        ledger.add(5, outcome(1))
        with pytest.raises(CheckFailed, match="has 1 labels of image 5, which 2 decided"):
            ledger.finish(0, 5, 2, "record", "timing")
        assert list(ledger.done()) == []


def test_the_content_has_a_hash_of_its_own_whatever_the_pages_look_like(tmp_path: Path) -> None:
    for name, order in (("a", (0, 1)), ("b", (1, 0))):
        with Ledger(tmp_path / name) as ledger:
            for idx in order:
                ledger.add(idx, outcome(idx))
                ledger.finish(idx, idx, 1, "r", "t")
    with Ledger(tmp_path / "a", read_only=True) as one, Ledger(tmp_path / "b", read_only=True) as other:
        assert one.content_sha256() == other.content_sha256()
    with sqlite3.connect(tmp_path / "b") as database:
        database.execute("update images set timing = 'u' where idx = 1")
    with Ledger(tmp_path / "a", read_only=True) as one, Ledger(tmp_path / "b", read_only=True) as other:
        assert one.content_sha256() != other.content_sha256()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_file_is_one_clear_error_or_a_right_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "ledger.sqlite"
    with Ledger(path) as ledger:
        for idx in range(4):
            for label in range(50):
                ledger.add(idx, outcome(label % 10))
            ledger.finish(idx, idx, 50, f"record {idx}\n" * 30, timing(50))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    for place in data.draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=8)) if content else ():
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(DensePureError), Ledger(path, read_only=True) as found:
        assert sum(len(image.labels()) <= 50 for image in found.done()) <= 8
        assert found.saved(0).labels.dtype == np.int32


def test_images_of_other_ledgers_are_taken_over_all_or_none(tmp_path: Path) -> None:
    def image(place: int) -> DoneImage:
        return DoneImage(place, 10 * place, packed([3] * place), f"record {place}", timing(place))

    def breaking() -> Iterator[DoneImage]:
        yield from map(image, (0, 1))
        raise CheckFailed("the other ledger is damaged")

    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(CheckFailed, match="the other ledger"):
            ledger.take_over(breaking())
        assert (ledger.count, list(ledger.done())) == (0, [])
        ledger.take_over(map(image, (4, 0, 2)))  # as they come
        assert ledger.count == 3
        found = [(done.place, done.idx, done.labels().tolist(), done.record, done.timing) for done in ledger.done()]
    assert found == [(p, 10 * p, [3] * p, f"record {p}", timing(p)) for p in (0, 2, 4)]


def test_a_folder_that_is_not_there_is_an_environment_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="nowhere"):
        Ledger(tmp_path / "nowhere" / "ledger.sqlite")


FOREIGN = {
    "a view without an end": """
        alter table images rename to t;
        create view images as with recursive c(x) as (select 1 union all select x + 1 from c)
            select x place, x idx, labels, record, timing from c, t;
    """,
    "a view beside": "create view v as select 1;",
    "a trigger": "create trigger u after insert on images begin delete from images; end;",
    "a virtual table": "create virtual table v using fts5(x);",
    "a column that is computed": "alter table images add column c text as (record);",
    "a column more": "alter table samples add column c text;",
    "an index by an expression": "create index i on images (abs(idx));",
    "another type": "drop table run; create table run (name text primary key, value blob not null) strict;",
}


@pytest.mark.parametrize("statements", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_ledger_that_declares_anything_else_is_neither_read_nor_written(tmp_path: Path, statements: str) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(statements)
    before = path.read_bytes()
    for read_only in (True, False):
        with pytest.raises(CheckFailed, match="is no ledger of this program: it declares"):
            Ledger(path, read_only)
        assert path.read_bytes() == before


def test_pages_that_go_in_circles_are_damage_and_no_endless_run(tmp_path: Path) -> None:
    """The root of the images' tree gets all its entries to point at one leaf."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.take_over(DoneImage(place, place, packed([0]), "r" * 900, timing(1, place)) for place in range(40))
    with contextlib.closing(sqlite3.connect(path)) as database:
        (root,) = database.execute("select rootpage from sqlite_master where name = 'images'").fetchone()
        (size,) = database.execute("pragma page_size").fetchone()
    content = bytearray(path.read_bytes())
    page = memoryview(content)[(root - 1) * size : root * size]
    assert page[0] == 5  # an interior page: https://sqlite.org/fileformat2.html, 1.6
    cells = [int.from_bytes(page[at : at + 2], "big") for at in range(12, 12 + 2 * int.from_bytes(page[3:5], "big"), 2)]
    for cell in cells[1:]:
        page[cell : cell + 4] = page[cells[0] : cells[0] + 4]
    del page
    path.write_bytes(content)
    with Ledger(path, read_only=True) as found:
        for read in (lambda: list(found.done()), lambda: found.count):
            with pytest.raises(CheckFailed, match="where numbers ascend"):
                read()


@pytest.mark.parametrize("name", ["ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-journal"])
def test_a_pipe_in_place_of_a_ledger_is_refused_at_once(tmp_path: Path, name: str) -> None:
    if name != "ledger.sqlite":
        Ledger(tmp_path / "ledger.sqlite").close()
    os.mkfifo(tmp_path / name)
    for read_only in (True, False):
        with pytest.raises(EnvironmentFault, match=f"{name} .it is a named pipe"):
            Ledger(tmp_path / "ledger.sqlite", read_only)
