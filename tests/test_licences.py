"""The page of licences against the packages that are installed here."""

from __future__ import annotations

import re
from importlib import metadata

from tests.installs import HASHED
from tests.licences import FILE, ROOT, declared

ROW = re.compile(r"\| ([a-z0-9-]+) \| (.+) \| .+ \|")


def listed() -> dict[str, str]:
    """The licence of each package on the page."""
    return {match[1]: match[2] for line in FILE.read_text(encoding="utf-8").splitlines() if (match := ROW.match(line))}


def test_every_package_of_the_edge_is_listed_with_what_it_declares() -> None:
    pins = (ROOT / HASHED).read_text(encoding="utf-8").splitlines()
    everywhere = {line.partition("==")[0] for line in pins if "==" in line and ";" not in line}
    assert len(everywhere) > 15
    rows = listed()
    assert everywhere <= set(rows)
    for name in everywhere:
        assert rows[name] == declared(metadata.distribution(name)), f"{name}: run `make licences`"


def test_nothing_is_under_the_gpl_and_nothing_is_undeclared() -> None:
    for name, licence in listed().items():
        assert not re.search(r"GPL|GNU", licence), name
        assert "not declared" not in licence, name
