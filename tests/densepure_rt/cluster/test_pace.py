"""When a task is late."""

from __future__ import annotations

from densepure_rt.cluster.pace import EXPECTED, LEAST, SLOW, UNKNOWN, Pace


def test_while_nothing_is_known_a_task_has_the_time_that_it_is_expected_to_take_and_more() -> None:
    assert Pace().limit(1, first=True) == UNKNOWN
    assert Pace(expected=0.1).limit(1, first=True) == EXPECTED
    assert Pace(expected=1000).limit(1, first=True) == 1000 * SLOW


def test_a_worker_ten_times_slower_than_its_peers_is_late_also_when_its_own_tasks_were_all_slow() -> None:
    pace = Pace()
    for _ in range(20):
        for worker, seconds in ((1, 1.0), (2, 1.5), (3, 10.0)):
            pace.note(worker, seconds, first=False)
    assert 1.5 < pace.limit(3, first=False) < 10
    assert pace.limit(1, first=False) > 10  # and those that are well are left alone


def test_short_tasks_are_not_late_for_a_moment() -> None:
    pace = Pace()
    pace.note(1, 0.01, first=False)
    assert pace.limit(2, first=False) == LEAST


def test_the_first_task_of_a_worker_has_the_time_that_the_first_of_others_took() -> None:
    pace = Pace()
    pace.note(1, 40.0, first=True)
    assert pace.limit(2, first=True) == pace.limit(2, first=False) == 40 * SLOW  # no other is known
    for _ in range(1000):
        pace.note(1, 2.0, first=False)
    assert pace.limit(2, first=True) == 40 * SLOW
    assert pace.limit(2, first=False) == 2 * SLOW


def test_the_only_worker_is_measured_against_itself() -> None:
    pace = Pace()
    pace.note(1, 7.0, first=False)
    assert pace.limit(1, first=False) == 7 * SLOW


def test_what_was_late_has_twice_the_time_so_that_no_machine_is_too_slow_for_ever() -> None:
    pace = Pace()
    pace.note(1, 2.0, first=False)
    assert [pace.limit(2, False, doublings) for doublings in range(4)] == [8, 16, 32, 64]


def test_a_stall_of_long_ago_is_forgotten() -> None:
    pace = Pace()
    pace.note(1, 1000.0, first=False)
    for _ in range(100):
        pace.note(1, 1.0, first=False)
    assert pace.limit(2, first=False) == SLOW
