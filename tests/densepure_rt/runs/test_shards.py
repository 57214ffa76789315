from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.errors import UsageError
from densepure_rt.images.datasets import open_images
from densepure_rt.runs.audit import audit
from densepure_rt.runs.shards import Shard
from tests.support.certify import certify

OF = st.integers(1, 40)


@given(OF, st.integers(0, 200))
def test_every_image_is_in_one_shard(of: int, images: int) -> None:
    shards = [Shard(number, of) for number in range(1, of + 1)]
    places = sorted(place for shard in shards for place in shard.places(images))
    assert places == list(range(images))
    assert [shard.size(images) for shard in shards] == [len(shard.places(images)) for shard in shards]
    assert max(shard.size(images) for shard in shards) - min(shard.size(images) for shard in shards) <= 1


def test_a_count_beyond_what_a_range_may_be_long_has_a_size_too() -> None:
    assert Shard(1, 3).size(3 * 10**30 + 1) == 10**30 + 1


@given(OF, st.data())
def test_a_shard_is_written_as_it_is_read(of: int, data: st.DataObject) -> None:
    shard = Shard(data.draw(st.integers(1, of)), of)
    assert Shard.parsed(str(shard)) == shard


@pytest.mark.parametrize(
    "text", ["", "2", "0/8", "9/8", "-1/8", "02/8", "2/08", "2 / 8", "2/8\n", "2/8/8", "a/b", "²/8"]
)
def test_what_is_no_shard_is_refused_with_one_that_is(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{text!r} is no shard")) as refused:
        Shard.parsed(text)
    assert "such as 2/8" in str(refused.value)


def test_a_shard_of_a_selection_has_every_nth_of_its_images() -> None:
    images = open_images(None, (1, 28, 28), [str(label) for label in range(10)]).select(3, 8)
    assert Shard(2, 3).select(images).order == images.order[1::3]
    assert [image.idx for image in Shard(2, 3).select(images)] == images.order[1::3]
    assert Shard(9, 9).select(images).order == []


# certify --shard and --key, as a user meets them

TINY = "--steps 0 --sigma 0.1 --radii 0 --n 60 --alpha 0.01 --batch 8 --threads 1 --max 3 --quiet".split()


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard 2/2 of three images in `second`, keyed by `noise.key`, which it made."""
    folder = tmp_path_factory.mktemp("shards")
    done = certify(folder / "second", *TINY, "--shard", "2/2", "--key", folder / "noise.key").done
    assert done.returncode == 0, done.stderr
    return folder


def test_a_shard_is_asked_for_its_own_images_and_has_the_identity_of_all(second: Path) -> None:
    summary = json.loads((second / "second" / "summary.json").read_text())
    manifest = json.loads((second / "second" / "manifest.json").read_text())
    assert (summary["done"], summary["asked"]) == (1, 1)
    assert (manifest["identity"]["images"]["count"], manifest["provenance"]["shard"]) == (3, "2/2")
    assert json.loads((second / "second" / "results.jsonl").read_text())["idx"] == 20


def test_the_key_is_made_for_its_owner_and_copied_into_the_folder(second: Path) -> None:
    key = second / "noise.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert (second / "second" / "secret.key").read_text() == key.read_text()


Certify = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--shard", "1/2", "--seed", 1), "needs a folder of its own"),
        (("--shard", "1/2", "--out", "new", "--seed", 1, "--falsify", 1), "--falsify attacks a whole run"),
        (("--shard", "1/2", "--out", "new"), "needs the secret that all shards share"),
        (("--seed", 1, "--out", ""), "names no folder"),
        (("--shard", "3/2", "--out", "new", "--seed", 1), "'3/2' is no shard"),
        (("--key", "noise.key", "--seed", 1), "--seed and --key"),
        (("--key", "other.key", "--out", "second", "--shard", "2/2"), "other.key is not there"),
        (("--key", "wrong.key", "--out", "second", "--shard", "2/2"), "wrong.key holds another secret"),
        (("--key", "bad.key",), "bad.key is no key"),
        (("--key", "noise.key", "--out", "second", "--shard", "1/2"), "holds shard 2/2, and shard 1/2 was asked for"),
        (("--key", "noise.key", "--out", "second", "--shard", "2/3"), "holds shard 2/2, and shard 2/3 was asked for"),
        (("--out", "second"), "holds shard 2/2, and the whole run was asked for"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_and_changes_nothing(
    second: Path, here: Certify, monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], words: str
) -> None:
    (second / "wrong.key").write_text("0" * 64 + "\n")
    (second / "bad.key").write_text("not hexadecimal\n")
    monkeypatch.chdir(second)
    before = {path: path.read_bytes() for path in second.rglob("*") if path.is_file()}
    done = here("certify", *TINY, *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    del before[second / "second" / "ledger.sqlite"]  # its pages may differ
    assert before.items() <= {path: path.read_bytes() for path in second.rglob("*") if path.is_file()}.items()
    assert not (second / "other.key").exists()


def test_a_shard_goes_on_with_its_own_secret_or_with_the_key_that_agrees(second: Path, here: Certify) -> None:
    before = (second / "second" / "seal.json").read_bytes()
    for options in ((), ("--key", second / "noise.key")):
        done = here("certify", *TINY, "--shard", "2/2", "--out", second / "second", *options)
        assert done.returncode == 0, done.stderr
        assert (second / "second" / "seal.json").read_bytes() == before


def test_a_shard_beyond_the_images_is_done_at_once_and_whole(tmp_path: Path, here: Certify) -> None:
    done = here("certify", *TINY, "--shard", "4/5", "--seed", 1, "--out", tmp_path / "empty")
    assert done.returncode == 0, done.stderr
    assert [finding for finding in audit(tmp_path / "empty") if not finding.holds] == []
    assert (tmp_path / "empty" / "seal.json").exists()


def test_a_dry_run_tells_the_cost_of_the_shard_and_makes_no_key(tmp_path: Path, here: Certify) -> None:
    options = (*TINY[:-1], "--shard", "1/2", "--key", tmp_path / "noise.key", "--dry-run", "--json")
    done = here("certify", *options)
    assert json.loads(done.stdout)["images"] == 2
    assert "2 of Fashion-MNIST test images (shipped), shard 1/2 of 3" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_predictions_with_one_key_are_the_same_and_with_another_are_not(tmp_path: Path, here: Certify) -> None:
    options = "--steps 0 --sigma 0.5 --n 40 --alpha 0.2 --batch 8 --threads 1 --max 6 --json".split()
    answers = [here("predict", *options, "--key", tmp_path / name).stdout for name in ("a.key", "a.key", "b.key")]
    assert len(answers[0].splitlines()) == 6
    assert answers[0] == answers[1] != answers[2]
