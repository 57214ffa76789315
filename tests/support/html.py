"""Pages as a browser sees them: tags, attributes, tables and text; and names that attack them."""

from __future__ import annotations

from html.parser import HTMLParser

OUTSIDE = ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "formaction", "background")


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


class Tables(HTMLParser):
    """The cells of each table, row by row; small print is left out."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.small = self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.inside = True
        elif tag == "small":
            self.small = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "small":
            self.small = False
        elif tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside and not self.small:
            self.tables[-1][-1][-1] += data


def attacks(address: str) -> tuple[str, ...]:
    return (
        f"<script src={address}/script></script><script>document.title = 'owned'</script>",
        f'"><img src="{address}/img" onerror="document.title = \'owned\'">',
        f"' style='background:url({address}/style)' x='",
        f"</style></title></svg><iframe src={address}/frame></iframe>",
        f"<link rel=stylesheet href={address}/link>$title ${{x}} &lt;b&gt; &amp; {{{{ 7 * 7 }}}} {{% raw %}} {{# #}}",
        f"<svg><image href={address}/image /></svg>",
    )


def inert(page: str) -> Seen:
    """The page, once nothing in it runs or asks for anything."""
    seen = Seen(page)
    assert {tag for tag, _ in seen.tags}.isdisjoint({"script", "iframe", "img", "image", "link", "object", "embed"})
    for tag, attributes in seen.tags:
        assert not any(key.startswith("on") or key in OUTSIDE for key in attributes), tag
        assert "url(" not in (attributes.get("style") or "")
    return seen
