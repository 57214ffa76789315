"""Real shards of the shipped engine, and made ones where it is the bookkeeping that is tested."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densepure_rt.errors import CheckFailed, DensePureError, UsageError
from densepure_rt.images.datasets import open_images
from densepure_rt.runs.audit import audit
from densepure_rt.runs.falsifier import Falsification
from densepure_rt.runs.folder import RunFolder
from densepure_rt.runs.ledger import Ledger
from densepure_rt.runs.merge import merge
from densepure_rt.runs.records import ArithmeticIdentity, ImagesIdentity, Manifest
from densepure_rt.runs.seal import seal
from densepure_rt.runs.secret import reveal
from densepure_rt.runs.shards import Shard
from densepure_rt.runs.summary import summarize
from tests.support.certify import certify, kill_at_a_random_moment
from tests.support.cli import densepure_rt as cli
from tests.support.runs import SECRET, manifest, result

TINY = "--steps 1 --n 100 --alpha 0.01 --radii 0,0.25 --batch 4 --threads 1 --skip 9 --max 7".split()
KILLED = "--steps 0 --sigma 0.1 --radii 0,0.05,0.1 --n 1500 --max 14 --seed 3 --batch 8 --threads 1".split()


# real shards


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of seven images with one key: the whole in `whole`, and shards 1/2, 2/4 and 4/4, merged in `merged`."""
    folder = tmp_path_factory.mktemp("real")
    for name, shard in {"whole": (), "a": ("1/2",), "b": ("2/4",), "c": ("4/4",)}.items():
        options = ("--shard", *shard) if shard else ()
        done = certify(folder / name, *TINY, "--key", folder / "noise.key", *options).done
        assert done.returncode == 0, done.stderr
    done = cli("merge", folder / "c", folder / "a", folder / "b", "--out", folder / "merged")
    assert done.returncode == 0, done.stderr
    assert "3 shards merged: 7 images" in done.stdout
    return folder


def rows_but_time(folder: Path) -> list[list[str]]:
    with (folder / "results.tsv").open(newline="") as lines:
        return [row[:5] for row in csv.reader(lines, delimiter="\t")]


def test_merged_shards_are_the_run_of_one_process_byte_for_byte(real: Path) -> None:
    whole, merged = real / "whole", real / "merged"
    assert {path.name for path in merged.iterdir()} == {path.name for path in whole.iterdir()}
    for name in ("results.jsonl", "summary.json", "secret.key"):
        assert (merged / name).read_bytes() == (whole / name).read_bytes(), name
    assert rows_but_time(merged) == rows_but_time(whole)
    assert stat.S_IMODE((merged / "secret.key").stat().st_mode) == 0o600
    ledgers = []
    for folder in (whole, merged):
        with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
            ledgers.append([(i.place, i.idx, i.labels().tolist(), i.record) for i in ledger.done()])
    assert ledgers[0] == ledgers[1]
    assert sum(len(labels) for _, _, labels, _ in ledgers[0]) > 7


def test_each_line_of_times_is_that_of_the_shard_which_took_it(real: Path) -> None:
    shards = {line for name in "abc" for line in (real / name / "timing.jsonl").read_text().splitlines()}
    merged = (real / "merged" / "timing.jsonl").read_text().splitlines()
    assert set(merged) == shards
    assert len(merged) == 7


def test_the_manifest_is_of_the_same_identity_and_says_what_was_merged(real: Path) -> None:
    found = {name: json.loads((real / name / "manifest.json").read_text()) for name in ("whole", "a", "b", "merged")}
    assert len({manifest["identity_sha256"] for manifest in found.values()}) == 1
    assert [found[name]["provenance"]["shard"] for name in found] == [None, "1/2", "2/4", None]
    assert found["whole"]["provenance"]["merged_from"] is None
    parts = found["merged"]["provenance"]["merged_from"]
    assert [part["shard"] for part in parts] == ["1/2", "2/4", "4/4"]
    assert parts[0]["started"] == found["a"]["provenance"]["started"]
    assert "merge" in found["merged"]["provenance"]["argv"]


def test_a_merged_run_is_audited_replayed_reported_compared_and_resumed_as_any_other(
    real: Path, tmp_path: Path
) -> None:
    whole, merged = real / "whole", real / "merged"
    images = open_images(None, (1, 28, 28), [str(label) for label in range(10)]).select(9, 7)
    assert [finding for finding in audit(merged, images) if not finding.holds] == []
    idx = json.loads((merged / "results.jsonl").read_text().splitlines()[3])["idx"]
    assert cli("replay", merged, "--image", idx, "--sample", 5, "--out", tmp_path / "pictures").returncode == 0
    assert cli("report", merged, real / "a", "--out", tmp_path / "page.html").returncode == 0
    compared = json.loads(cli("compare", whole, merged, "--json").stdout)
    assert (compared["pairs"], compared["differs"], compared["gained"], compared["lost"]) == (7, [], [], [])
    before = (merged / "seal.json").read_bytes()
    again = certify(merged, *TINY).done
    assert again.returncode == 0, again.stderr
    assert "results in" in again.stdout
    assert "7/7 images" not in again.stderr  # nothing was left to do
    assert (merged / "seal.json").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL there")
def test_shards_that_are_killed_at_random_moments_merge_to_the_same(tmp_path: Path) -> None:
    whole, chance = certify(tmp_path / "whole", *KILLED).out, random.Random(1)
    for number, times in ((1, 0), (2, 3)):
        options = (*KILLED, "--shard", f"{number}/2")
        for _ in range(times):
            kill_at_a_random_moment(*options, out=tmp_path / str(number), chance=chance)
        assert certify(tmp_path / str(number), *options).done.returncode == 0
    merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    for name in ("results.jsonl", "summary.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (whole / name).read_bytes()
    assert not (tmp_path / "merged" / "secret.key").exists()  # of a public seed there is none


# made shards


def make(path: Path, shard: str | None, images: int = 7, left: int = 0, **identity: Any) -> Path:
    """The folder of a shard, or of a whole run, over images 0, 10, 20, ...; the last `left` of its own are not done."""
    of = manifest(SECRET, **({"images": ImagesIdentity(images, "b" * 64)} | identity))
    of = replace(of, provenance=replace(of.provenance, shard=shard))
    places = of.shard.places(images)
    with RunFolder(path, of, SECRET) as folder:
        for place in places[: len(places) - left]:
            radius = None if place % 3 == 0 else place / 8
            folder.add(result(10 * place, predict=None if radius is None else 3, radius=radius), place)
        folder.finish(summarize(folder.done, of.asked, False, (0.0, 0.25), 0.5))
    return path


def edit_manifest(path: Path, **provenance: object) -> None:
    """As a forger would who seals anew."""
    there = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(there | {"provenance": there["provenance"] | provenance}, indent=2))
    seal_anew(path)


def seal_anew(path: Path) -> None:
    with Ledger(path / "ledger.sqlite") as ledger:
        seal(path, ledger)


@st.composite
def partitions(draw: st.DrawFn) -> list[Shard]:
    """Shards, in any order, that hold each image once: some shard of a partition is split again and again."""
    shards = [Shard(1, 1)]
    for _ in range(draw(st.integers(0, 4))):
        split = shards.pop(draw(st.integers(0, len(shards) - 1)))
        k = draw(st.integers(2, 3))
        shards += [Shard(split.number + i * split.of, split.of * k) for i in range(k)]
    return draw(st.permutations(shards))


@settings(max_examples=8, deadline=None)
@given(shards=partitions(), images=st.integers(1, 9), data=st.data())
def test_any_partition_merges_to_the_whole_and_any_double_or_missing_image_is_named(
    tmp_path_factory: pytest.TempPathFactory, shards: list[Shard], images: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("partition")
    paths = [make(folder / str(i), str(shard), images) for i, shard in enumerate(shards)]
    whole = make(folder / "whole", None, images)
    merge(paths, folder / "merged")
    for name in ("results.jsonl", "results.tsv", "timing.jsonl"):
        assert (folder / "merged" / name).read_bytes() == (whole / name).read_bytes()

    place = data.draw(st.integers(0, images - 1))
    without = [path for path, shard in zip(paths, shards, strict=True) if place not in shard.places(images)]
    (lost,) = (list(shard.places(images)) for shard in shards if place in shard.places(images))
    if without and len(lost) < images:
        with pytest.raises(UsageError, match=f"{len(lost)} images? of {images} missing") as missing:
            merge(without, folder / "nothing")
        assert named_places(str(missing.value)) == lost[:8]
    again = make(folder / "again", str(Shard(place + 1, images)), images)
    with pytest.raises(UsageError, match=f"overlap in 1 image, idx {10 * place}:"):
        merge([*paths, again], folder / "nothing")
    assert not (folder / "nothing").exists()


def named_places(message: str) -> list[int]:
    found = re.search(r"at the places ([0-9, ]+)", message)
    assert found
    return [int(number) for number in re.findall("[0-9]+", found[1])]


def test_what_is_missing_is_named_by_shard_too_whatever_the_n_of_the_others(tmp_path: Path) -> None:
    half, quarter = make(tmp_path / "half", "1/2"), make(tmp_path / "quarter", "4/4")
    with pytest.raises(UsageError, match=r"2 images of 7 missing, at the places 1, 5 of the set.* shard 2/4 too"):
        merge([quarter, half], tmp_path / "merged")


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"30 images of 40 .* 1, 2, 3, 5, 6, 7, 9, 10, \.\.\. of.* 2/4, 3/4, 4/4 too"):
        merge([make(tmp_path / "one", "1/4", 40)], tmp_path / "merged")


def test_with_more_shards_than_images_the_empty_ones_may_be_there_or_not(tmp_path: Path) -> None:
    paths = [make(tmp_path / str(i), f"{i}/4", 3) for i in (1, 2, 3, 4)]
    for name, some in (("with", paths), ("without", paths[:3])):
        assert merge(some, tmp_path / name).done == 3


def refused(kind: type[DensePureError], words: str, paths: Sequence[Path], out: Path) -> None:
    with pytest.raises(kind, match=words):
        merge(paths, out)
    assert not out.exists()


def test_shards_of_another_run_are_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    one, other = make(tmp_path / "1", "1/2"), make(tmp_path / "2", "2/2", processor="two", sigma=0.25)
    words = r"of another run than .*1 \(`sigma` 0.5 in .*1, 0.25 in .*2; processor: .one. in .*1, .two. in .*2\)"
    refused(UsageError, words, [one, other], tmp_path / "merged")


def test_shards_of_machines_that_compute_otherwise_are_refused(tmp_path: Path) -> None:
    one = make(tmp_path / "1", "1/2")
    other = make(tmp_path / "2", "2/2", arithmetic=ArithmeticIdentity("f" * 64, driver="560.28, CUDA 12.6"))
    refused(
        UsageError,
        r"arithmetic.driver: null in .*1, .560.28, CUDA 12.6. in .*2.*compute alike",
        [one, other],
        tmp_path / "m",
    )


def test_shards_that_do_not_say_how_their_machine_computed_are_refused(tmp_path: Path) -> None:
    shards = [make(tmp_path / part, f"{part}/2", arithmetic=None) for part in "12"]
    refused(UsageError, "1 holds an old run, whose manifest does not say", shards, tmp_path / "merged")


def test_a_whole_run_is_no_shard(tmp_path: Path) -> None:
    refused(UsageError, "holds a whole run", [make(tmp_path / "run", None)], tmp_path / "merged")


def test_one_folder_named_twice_overlaps_with_itself(tmp_path: Path) -> None:
    one = make(tmp_path / "1", "1/2")
    refused(UsageError, r"shards 1/2 and 1/2, overlap in 4 images, idx 0, 20, 40, 60", [one, one], tmp_path / "merged")


def test_all_incomplete_shards_are_named_with_what_they_miss(tmp_path: Path) -> None:
    paths = [make(tmp_path / "1", "1/3"), make(tmp_path / "2", "2/3", left=1), make(tmp_path / "3", "3/3", left=2)]
    words = r"2 \(shard 2/3: 1 of 2 images missing\), .*3 \(shard 3/3: 2 of 2 images missing\)"
    refused(CheckFailed, words, paths, tmp_path / "merged")


@pytest.mark.parametrize("name", ["manifest.json", "results.jsonl", "results.tsv", "timing.jsonl", "summary.json"])
def test_a_broken_seal_is_refused_with_the_file(tmp_path: Path, name: str) -> None:
    paths = [make(tmp_path / "1", "1/2"), make(tmp_path / "2", "2/2")]
    (paths[1] / name).write_bytes((paths[1] / name).read_bytes() + b" \n")
    refused(CheckFailed, f"{name} in .*2 was changed", paths, tmp_path / "merged")
    (paths[1] / name).unlink()
    refused(UsageError if name == "manifest.json" else CheckFailed, name, paths, tmp_path / "merged")


def test_a_shard_without_a_seal_or_a_ledger_is_refused(tmp_path: Path) -> None:
    paths = [make(tmp_path / "1", "1/2"), make(tmp_path / "2", "2/2")]
    (paths[0] / "seal.json").unlink()
    refused(CheckFailed, "1 is complete, and was not sealed", paths, tmp_path / "merged")
    (paths[0] / "ledger.sqlite").unlink()
    refused(UsageError, "ledger.sqlite is missing", paths, tmp_path / "merged")
    (paths[0] / "ledger.sqlite").write_bytes(b"garbage" * 200)
    refused(CheckFailed, "damaged", paths, tmp_path / "merged")


FORGED = {
    "update images set place = 3 where place = 2": "place 3 in the run, which is none of shard 1/2",
    "update images set place = 70 where place = 2": "place 70 in the run",
    "update images set idx = 5 where place = 2": "image 5, is damaged: its record is of image 20",
    "update images set record = '{}' where place = 2": "image 20, is damaged, at idx",
    "update images set labels = x'00' where place = 2": "labels in the ledger are damaged",
}


@pytest.mark.parametrize("statement", FORGED)
def test_a_ledger_that_no_run_has_written_is_refused_also_when_it_is_sealed_anew(
    tmp_path: Path, statement: str
) -> None:
    paths = [make(tmp_path / "1", "1/2"), make(tmp_path / "2", "2/2")]
    with sqlite3.connect(paths[0] / "ledger.sqlite") as database:
        database.execute(statement)
    database.close()
    refused(CheckFailed, "ledger.sqlite in .* was changed", paths, tmp_path / "merged")
    seal_anew(paths[0])
    refused(CheckFailed, FORGED[statement], paths, tmp_path / "merged")


def test_an_image_that_two_shards_have_at_two_places_is_refused(tmp_path: Path) -> None:
    one, copy = make(tmp_path / "1", "1/2", 6), shutil.copytree(tmp_path / "1", tmp_path / "2")
    with sqlite3.connect(copy / "ledger.sqlite") as database:
        database.execute("update images set place = -place - 1")
        database.execute("update images set place = -place")
    database.close()
    edit_manifest(copy, shard="2/2")
    refused(UsageError, "overlap in 3 images, idx 0, 20, 40", [one, copy], tmp_path / "merged")


@pytest.mark.parametrize(
    ("claim", "words"), [("2/2", "none of shard 2/2"), ("3/2", "provenance.shard"), ("1/3", "not complete|none of")]
)
def test_a_claim_that_does_not_fit_the_images_is_refused(tmp_path: Path, claim: str, words: str) -> None:
    paths = [make(tmp_path / "1", "1/2", 6), make(tmp_path / "2", "2/2", 6)]
    edit_manifest(paths[0], shard=claim)
    refused(CheckFailed, words, paths, tmp_path / "merged")


def test_a_manifest_that_claims_another_identity_is_refused(tmp_path: Path) -> None:
    one = make(tmp_path / "1", "1/1")
    there = json.loads((one / "manifest.json").read_text())
    (one / "manifest.json").write_text(json.dumps(there | {"identity_sha256": "0" * 64}))
    refused(CheckFailed, "not the identity that it claims", [one], tmp_path / "merged")


def test_the_key_is_taken_from_any_shard_that_has_it_and_another_one_is_refused(tmp_path: Path) -> None:
    paths = [make(tmp_path / "1", "1/2"), make(tmp_path / "2", "2/2")]
    (paths[0] / "secret.key").unlink()
    merge(paths, tmp_path / "merged")
    assert bytes.fromhex((tmp_path / "merged" / "secret.key").read_text()) == SECRET
    (paths[1] / "secret.key").write_text("0" * 64)
    refused(CheckFailed, "the key in .*2 is not the one", paths, tmp_path / "again")
    (paths[1] / "secret.key").unlink()
    merge(paths, tmp_path / "keyless")
    assert not (tmp_path / "keyless" / "secret.key").exists()


def test_what_was_revealed_of_one_shard_is_revealed_of_the_run(tmp_path: Path) -> None:
    paths = [make(tmp_path / "1", "1/2"), make(tmp_path / "2", "2/2")]
    reveal(paths[1])
    for _ in range(2):  # also when it was done before
        merge(paths, tmp_path / "merged")
        assert not (tmp_path / "merged" / "secret.key").exists()
        assert bytes.fromhex((tmp_path / "merged" / "secret.revealed").read_text()) == SECRET
        provenance = json.loads((tmp_path / "merged" / "manifest.json").read_text())["provenance"]
        assert provenance["revealed_secret"] == SECRET.hex()


def test_a_secret_that_the_manifest_alone_reveals_is_revealed_of_the_run(tmp_path: Path) -> None:
    paths = [make(tmp_path / "1", "1/2"), make(tmp_path / "2", "2/2")]
    reveal(paths[1])
    for file in (paths[0] / "secret.key", paths[1] / "secret.revealed"):
        file.unlink()
    merge(paths, tmp_path / "merged")
    assert manifest_of(tmp_path / "merged").provenance.revealed_secret == SECRET.hex()
    assert not (tmp_path / "merged" / "secret.key").exists()
    edit_manifest(paths[1], revealed_secret="00" * 32)
    refused(CheckFailed, "the key in .*2 is not the one", paths, tmp_path / "forged")


def attack(idx: int, broken: bool = False) -> Falsification:
    found = (0.04, 7, 25, 25, 5e-7) if broken else (None,) * 5
    return Falsification(idx, 0.125, broken, "noise", 1, 1, 40, *found)


def attacked(path: Path, shard: str, *attacks: Falsification) -> Path:
    make(path, shard)
    with RunFolder(path, manifest_of(path), SECRET) as folder:
        folder.keep_attacks(attacks)
        folder.finish(summarize(folder.done, 7 // 2 + (shard == "1/2"), False, (0.0, 0.25), 0.5))
    return path


def manifest_of(path: Path) -> Manifest:
    from densepure_rt.runs.layout import read_manifest

    return read_manifest(path)


def test_attacks_are_merged_in_the_order_of_the_images_with_the_pictures_of_those_that_broke(tmp_path: Path) -> None:
    one = attacked(tmp_path / "1", "1/2", attack(20), attack(40))
    other = attacked(tmp_path / "2", "2/2", attack(10), attack(50, broken=True))
    (other / "broken-50.png").write_bytes(b"a picture")
    merge([one, other], tmp_path / "merged")
    lines = (tmp_path / "merged" / "falsify.jsonl").read_text().splitlines()
    assert [json.loads(line)["idx"] for line in lines] == [10, 20, 40, 50]
    assert (tmp_path / "merged" / "broken-50.png").read_bytes() == b"a picture"
    assert "falsify.jsonl" in json.loads((tmp_path / "merged" / "seal.json").read_text())["sha256"]


def test_a_certificate_that_an_attack_on_a_shard_has_broken_is_said_with_exit_code_1(tmp_path: Path) -> None:
    one, other = attacked(tmp_path / "1", "1/2", attack(20)), attacked(tmp_path / "2", "2/2", attack(50, broken=True))
    for _ in range(2):  # also when it was merged before
        for json_or_not in ((), ("--json",)):
            done = cli("merge", one, other, "--out", tmp_path / "merged", *json_or_not)
            assert done.returncode == 1
            assert "error: image 50: 25 of 25 samples are for class 7 at a distance of 0.04" in done.stderr
            assert "2 certificates attacked with 80 samples, 1 broken" in done.stderr


def test_an_attack_on_an_image_of_another_shard_is_refused(tmp_path: Path) -> None:
    paths = [attacked(tmp_path / "1", "1/2", attack(10)), make(tmp_path / "2", "2/2")]
    refused(CheckFailed, "does not hold: 10", paths, tmp_path / "merged")


# the folder that is written


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    paths = [make(tmp_path / "1", "1/2"), make(tmp_path / "2", "2/2")]
    whole = make(tmp_path / "whole", None, left=3)
    for taken in (whole, paths[0]):
        before = {path.name: path.read_bytes() for path in taken.iterdir()}
        with pytest.raises(UsageError, match="already holds a run that was not merged from these"):
            merge(paths, taken)
        assert {path.name: path.read_bytes() for path in taken.iterdir()} == before


def test_a_merge_that_was_done_before_is_checked_and_left_alone(tmp_path: Path) -> None:
    paths, out = [make(tmp_path / "1", "1/2"), make(tmp_path / "2", "2/2")], tmp_path / "merged"
    first = merge(paths, out)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert merge(paths, out) == first
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()} == before
    (out / "results.tsv").write_text("")
    with pytest.raises(CheckFailed, match=r"results\.tsv in .* was changed"):
        merge(paths, out)


KILLED_MERGE = """
import os, sys
from pathlib import Path
from densepure_rt.runs.merge import merge
count, last, out = 0, int(sys.argv[1]), Path(sys.argv[2])

def trace(frame, event, argument):
    global count
    if "densepure_rt" not in frame.f_code.co_filename:
        return None
    count += event == "line" and out.exists()
    if count > last:
        os._exit(9)
    return trace

sys.settrace(trace)
merge([Path(path) for path in sys.argv[3:]], out)
sys.settrace(None)
print(count)
"""


def test_a_merge_that_is_killed_leaves_nothing_that_looks_whole_and_can_be_made_again(tmp_path: Path) -> None:
    """Killed at lines that lie evenly among those it runs from when its folder is there."""
    paths = [make(tmp_path / "1", "1/2"), make(tmp_path / "2", "2/2")]

    def killed_after(lines: int, out: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED_MERGE, str(lines), str(out), *map(str, paths)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)

    total = int(killed_after(10**9, tmp_path / "unharmed").stdout)
    expected = (tmp_path / "unharmed" / "results.jsonl").read_bytes()
    sealed = 0
    for i in range(6):
        out = tmp_path / f"killed-{i}"
        assert killed_after(total * i // 6, out).returncode == 9
        sealed += (out / "seal.json").exists()
        merge(paths, out)
        assert (out / "results.jsonl").read_bytes() == expected
        assert (out / "seal.json").exists()
    assert sealed < 3  # of a part that was checked once more when it was whole


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    one = make(tmp_path / "1", "1/2")
    done = cli("merge", one, "--out", tmp_path / "merged")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 3 images of 7 missing")
    assert cli("merge", tmp_path / "nowhere", "--out", tmp_path / "merged").returncode == 2
    assert (nameless := cli("merge", one, "--out", "")).returncode == 2
    assert "names no folder" in nameless.stderr
    assert cli("merge", make(tmp_path / "2", "2/2", left=1), one, "--out", tmp_path / "merged").returncode == 1
