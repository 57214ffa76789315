from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.elements import Html, element, joined
from densepure_rt.text import printable

ANY = st.text(st.characters(exclude_categories=()))


class Seen(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@given(ANY, ANY)
def test_text_never_becomes_markup_and_no_control_is_left(text: str, value: str) -> None:
    page = element("p", text, title=value)
    seen = Seen(page)
    assert seen.tags == [("p", {"title": printable(value, keep="\n")})]
    assert seen.text == printable(text, keep="\n")
    assert printable(page, keep="\n") == page


def test_elements_nest_and_what_is_none_is_left_out() -> None:
    inner = element("b", "1 < 2", class_="x")
    assert element("p", inner, None, " & ", id=None) == '<p><b class="x">1 &lt; 2</b> &amp; </p>'
    assert element("img", src="a", aria_hidden="true") == '<img src="a" aria-hidden="true">'
    assert joined("<", inner) == '&lt;<b class="x">1 &lt; 2</b>'


def test_markup_that_is_changed_is_text_again() -> None:
    assert element("p", Html("<b>") + "</b>") == "<p>&lt;b&gt;&lt;/b&gt;</p>"
