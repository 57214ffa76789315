"""The soak of `make soak`, for seconds; and that it finds what it is there to find."""

from __future__ import annotations

from collections import Counter

from tests.soak import Answer, Part, Report, State, run


def test_a_server_under_attack_answers_right_and_keeps_nothing() -> None:
    said: list[str] = []
    report = run(10.0, said.append)
    faults = [fault for fault in report.faults() if "memory" not in fault]  # which is warm after a minute
    assert faults == []
    assert len(report.answers) > 20
    assert report.secrets > 1
    assert report.slow_turns == 0
    assert all(report.begun[kind] for kind in ("chunks", "bombs", "aborts", "slow_readers", "idle"))
    assert said[0].split()[:2] == ["part", "answers"]
    assert len(said) == len(report.parts) + 3


def test_what_does_not_hold_is_named() -> None:
    state = State(100 * 2**20, 12, 9)
    part = Part(1, Counter({200: 1}), [0.001], [state])
    answer = Answer("predict", 0, {}, [])

    def faults(last: State, **given: object) -> list[str]:
        return Report(**{"parts": [part], "answers": [answer], "rests": [state, last]} | given).faults()  # type: ignore[arg-type]

    assert faults(State(104 * 2**20, 16, 13)) == []
    assert faults(State(106 * 2**20, 12, 9)) == ["memory has grown"]
    assert (
        faults(State(100 * 2**20, 17, 9)) == faults(State(100 * 2**20, 12, 14)) == ["descriptors or threads are left"]
    )
    assert faults(state, exit_code=3, said="x") == ["exit code 3: x"]
    assert faults(state, wrong=["predict"]) == ["1 wrong answers: ['predict']"]
    assert faults(state, parts=[part, Part()]) == ["a part has no answer"]
