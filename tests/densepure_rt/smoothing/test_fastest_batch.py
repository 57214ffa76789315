from __future__ import annotations

import json
from pathlib import Path

import pytest

import densepure_rt
from densepure_rt.errors import EnvironmentFault
from densepure_rt.runtime.bundle import Bundle, open_bundle, shipped_engine
from densepure_rt.smoothing import fastest_batch as module
from densepure_rt.smoothing.fastest_batch import FILE, ON_CPU, ON_GPU, candidates, fastest_batch
from tests.support.cli import cli, refused
from tests.support.plans import a_plan, put_bundle


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "densepure-rt" / FILE


@pytest.fixture
def bundle() -> Bundle:
    return open_bundle(shipped_engine())


def timed(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> list[int]:
    """Let each batch take so long; those that have no time have no memory. Returns the batches that were timed."""
    asked = []

    def take(bundle: Bundle, batch: int, *_: object) -> float:
        asked.append(batch)
        if batch not in seconds:
            raise EnvironmentFault(f"no room for {batch}")
        return seconds[batch]

    monkeypatch.setattr(module, "seconds_per_image", take)
    return asked


def test_the_fastest_is_taken_and_remembered(cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, {16: 3.0, 32: 1.0, 64: 2.0})
    assert fastest_batch(bundle, 1, "cpu") == 32
    assert fastest_batch(bundle, 1, "cpu") == 32
    assert asked == list(ON_CPU)
    assert fastest_batch(bundle, 2, "cpu") == 32  # with other threads it is another question
    assert asked == [*ON_CPU, *ON_CPU]
    assert list(json.loads(cache.read_text()).values()) == [32, 32]


def test_a_batch_without_memory_is_left_out(cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {16: 3.0})
    assert fastest_batch(bundle, 1, "cpu") == 16
    timed(monkeypatch, {})
    with pytest.raises(EnvironmentFault, match="no room for 64"):
        fastest_batch(bundle, 3, "cpu")


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": "32"}', '{"a": NaN}'])
def test_a_damaged_memory_is_no_memory(
    cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    timed(monkeypatch, {16: 1.0, 32: 2.0, 64: 3.0})
    assert fastest_batch(bundle, 1, "cpu") == 16
    assert list(json.loads(cache.read_text()).values()) == [16]


def test_a_folder_that_cannot_be_written_costs_a_second_timing_alone(
    cache: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.write_text("a file in its place")
    asked = timed(monkeypatch, {16: 1.0, 32: 2.0, 64: 3.0})
    assert fastest_batch(bundle, 1, "cpu") == fastest_batch(bundle, 1, "cpu") == 16
    assert len(asked) == 6


def test_plans_are_timed_at_their_own_batches(tmp_path: Path, bundle: Bundle) -> None:
    assert candidates(bundle, "cpu") == ON_CPU
    assert candidates(bundle, "cuda") == ON_GPU == (64, 256, 512)
    assert candidates(open_bundle(put_bundle(tmp_path, a_plan(batches=(256, 8)))), "cpu") == (8, 256)


def test_an_engine_is_really_timed_and_runs_at_that_batch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ON_CPU", (2, 4))
    with densepure_rt.load(batch="auto", threads=1) as classifier:
        assert classifier.device.batch in (2, 4)
        assert list(json.loads(cache.read_text()).values()) == [classifier.device.batch]


def test_the_command_line_takes_auto_and_refuses_other_words() -> None:
    refused(cli("certify", "--dry-run", "--batch", "some"), 2, "--batch some", "auto")
    refused(cli("certify", "--dry-run", "--batch", "auto", "--cluster", "ray"), 2, "--batch auto", "--cluster")
