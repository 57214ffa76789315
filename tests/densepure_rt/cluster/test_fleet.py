"""What a fleet is without its workers; with them, see test_cluster.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from densepure_rt.cluster.fleet import cause_of
from densepure_rt.cluster.tasks import Engines, Portion, Strip
from densepure_rt.runtime.bundle import open_bundle, shipped_engine


def engines(kind: str) -> Engines:
    description: dict[str, str | int | bool] = {
        "processor": kind,
        "batch": 8,
        "independent_of_batch": True,
        "fingerprint": "a" * 64,
    }
    return Engines(open_bundle(shipped_engine()), description, "1", 8, "node", "id", 0)


def test_what_a_label_cannot_depend_on_makes_no_other_group() -> None:
    one = engines("a")
    same = replace(
        one, batch=64, node="elsewhere", node_id="b", pid=7, description={**one.description, "threads": 9, "batch": 64}
    )
    assert same.sha256 == one.sha256
    assert replace(one, version="2").sha256 != one.sha256
    assert replace(one, bundle=replace(one.bundle, sidecars=("0" * 64, None))).sha256 != one.sha256


@pytest.mark.parametrize("told", [{"fingerprint": "b" * 64}, {"processor": "b"}, {"instruction_sets": "avx2"}])
def test_a_worker_that_computes_otherwise_is_of_another_group(told: dict[str, str]) -> None:
    one = engines("a")
    assert replace(one, description={**one.description, **told}).sha256 != one.sha256


def test_a_batch_that_results_may_depend_on_makes_another_group() -> None:
    one = replace(engines("a"), description={**engines("a").description, "independent_of_batch": False})
    assert replace(one, description={**one.description, "batch": 64}).sha256 != one.sha256
    assert replace(one, description={**one.description, "threads": 4}).sha256 == one.sha256


def test_a_portion_falls_into_those_of_its_images() -> None:
    portion = Portion((Strip(3, 0, 5), Strip(1, 7, 2), Strip(3, 9, 1)))
    assert portion.handles == [3, 1]
    assert portion.of(3) == (Strip(3, 0, 5), Strip(3, 9, 1))
    assert portion.without({3}).strips == (Strip(1, 7, 2),)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RayTaskError("draw", "traceback", ValueError("one\nillegal memory access")),
            "ValueError: illegal memory access",
        ),
        (RayTaskError("draw", "traceback", ValueError()), "ValueError: "),
        (ActorDiedError(), "its process or its machine is gone"),
        (ConnectionError(), "ConnectionError"),
    ],
)
def test_why_a_worker_was_lost_is_one_line_even_of_an_error_that_says_nothing(error: Exception, said: str) -> None:
    assert cause_of(error) == said
