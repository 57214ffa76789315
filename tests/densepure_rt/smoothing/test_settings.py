from __future__ import annotations

from typing import get_args

import pytest

from densepure_rt.errors import UsageError
from densepure_rt.runs.summary import RADII, radii_of
from densepure_rt.smoothing.certificate import Method
from densepure_rt.smoothing.sequential import SequentialRule
from densepure_rt.smoothing.settings import RULES, Settings


class Another(SequentialRule):
    """A rule that decides radii one by one, by whatever name it is asked for."""


def test_every_method_has_its_rule() -> None:
    assert set(RULES) == set(get_args(Method))
    for method, rule in RULES.items():
        assert type(Settings(method=method).rule(784, labelled=True)) is rule


def test_what_is_asked_of_a_rule_follows_from_its_class_and_not_from_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert radii_of(Settings(method="radius")) == RADII
    monkeypatch.setitem(RULES, "radius", Another)
    asked = Settings(sigma=0.25, method="radius", radii=(0.5, 9.0))
    rule = asked.rule(784, labelled=True)
    assert isinstance(rule, Another)
    assert (rule.radii, rule.reachable()) == ((0.5, 9.0), (0.5,))
    assert asked.decided == radii_of(asked) == (0.5, 9.0)
    with pytest.raises(UsageError, match="are all beyond reach"):
        Settings(sigma=0.25, method="radius", radii=(9.0,)).check_reach(784, labelled=True)
    with pytest.raises(UsageError, match="a radius loss is what the method radius accepts"):
        Settings(method="radius", radius_loss=0.1)
