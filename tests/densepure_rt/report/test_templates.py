"""Text in a page stays text, whatever it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import DictLoader, UndefinedError
from markupsafe import Markup

from densepure_rt.report.step_chart import COLOURS
from densepure_rt.report.templates import ENVIRONMENT, environment, rendered
from densepure_rt.text import printable
from tests.support.html import Seen

ANY = st.text(st.characters(exclude_categories=()))


def made(template: str, **values: object) -> str:
    return rendered(environment(DictLoader({"a page": template})), "a page", values)


@given(ANY, ANY)
def test_text_never_becomes_markup_and_no_control_is_left(text: str, value: str) -> None:
    page = made('<p title="{{ value }}">{{ text }}</p>', text=text, value=value)
    seen = Seen(page)
    assert seen.tags == [("p", {"title": printable(value, keep="\n")})]
    assert seen.text == printable(text, keep="\n")
    assert printable(page, keep="\n") == page


@given(ANY)
def test_neither_a_macro_nor_an_operator_lets_a_control_through(text: str) -> None:
    page = made(
        '{% macro bold(x) %}<b>{{ x }}</b>{% endmacro %}{{ bold(text) ~ text }}{{ [text, text]|join(", ") }}', text=text
    )
    plain = printable(text, keep="\n")
    assert Seen(page).tags == [("b", {})]
    assert Seen(page).text == f"{plain}{plain}{plain}, {plain}"
    assert printable(page, keep="\n") == page


def test_markup_goes_in_as_it_is_and_what_is_added_to_it_is_text() -> None:
    inner = made('<b class="x">{{ text }}</b>', text="1 < 2")
    assert inner == '<b class="x">1 &lt; 2</b>'
    assert made("<p>{{ inner }} {{ text }}</p>", inner=Markup(inner), text="&") == f"<p>{inner} &amp;</p>"
    assert made("<p>{{ text }}</p>", text=inner[:3]) == "<p>&lt;b </p>"
    assert made("<p>{{ text }}</p>", text=Markup("<b>") + "</b>") == "<p><b>&lt;/b&gt;</p>"


def test_what_is_missing_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="value"):
        made("{{ value }}")
    with pytest.raises(UndefinedError, match="value"):
        made("{% if value %}{% endif %}")


@pytest.mark.parametrize("value", [None, 0.29996, float("nan")])
def test_only_texts_and_whole_numbers_are_laid_out(value: float | None) -> None:
    with pytest.raises(TypeError, match="make it a text in Python"):
        made("{{ value }}", value=value)
    assert made("{{ value }} {{ (1 / 3)|place }} {{ x|place }}", value=7, x=0.666) == "7 0.33 0.67"


def test_the_colours_of_lines_are_those_of_the_theme() -> None:
    theme = rendered(ENVIRONMENT, "theme.css", {})
    light, dark = theme.split("@media")
    for i, colour in enumerate(COLOURS):
        assert f".line{i} {{ --c: var(--line{i}) }}" in theme
        assert f"--line{i}: {colour};" in light
        assert f"--line{i}: #" in dark
    assert f"--line{len(COLOURS)}:" not in theme
