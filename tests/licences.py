"""`make licences` writes docs/licences.md: what the installed packages declare in their metadata, nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "licences.md"
PROJECT = "densepure-rt"
# The extras that `make test` installs. The others are for machines with a GPU: NVIDIA's packages bring its licences.
EXTRAS = ("cpu", "serve", "report", "cluster", "export")
CLASSIFIER = re.compile(r"License :: (?:OSI Approved :: )?(.+)")
OF_NVIDIA = re.compile("nvidia-|cuda-|triton$")  # of a torch with CUDA
SHORT = 60  # characters: a longer text in the field License is the licence itself
HEAD = f"""# Licences

What each package declares in its metadata that `pip install '.[{",".join(EXTRAS)}]'` brings on Linux and Python 3.11.
Made by `make licences` from the packages that are installed: do not edit. Declared, not compared with the packages'
sources. NVIDIA's packages, which PyTorch and the TensorRT extras bring, are under NVIDIA's own terms and not listed.

| package | licence as declared | for |
|---|---|---|
"""


def declared(package: metadata.Distribution) -> str:
    """The licence by the expression, else by the classifiers, else by a short field License."""
    fields = package.metadata
    if "License-Expression" in fields:
        return fields["License-Expression"]
    found = [match[1] for line in fields.get_all("Classifier", []) if (match := CLASSIFIER.fullmatch(line))]
    if found:
        return "; ".join(found)
    text = fields["License"].strip() if "License" in fields else ""
    return text if text and len(text) <= SHORT and "\n" not in text else "not declared in one line"


def needed(requirements: Iterable[str], extras: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What a package asks for here: each name with its extras."""
    chosen = list(extras) or [""]
    for text in requirements:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in chosen):
            yield canonicalize_name(requirement.name), tuple(sorted(requirement.extras))


def brought(extras: Iterable[str]) -> set[str]:
    """All that the package and these extras of it bring, by name, of what is installed."""
    found: set[str] = set()
    left: list[tuple[str, tuple[str, ...]]] = [(PROJECT, tuple(extras))]
    seen = set(left)
    while left:
        name, chosen = left.pop()
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        more = set(needed(package.requires or (), chosen)) - seen
        seen |= more
        left += more
    return found - {PROJECT}


def page() -> str:
    """The text of the file."""
    by_extra = {"": brought(())} | {extra: brought([extra]) for extra in EXTRAS}
    rows = []
    for name in sorted(name for name in set.union(*by_extra.values()) if not OF_NVIDIA.match(name)):
        base = name in by_extra[""]
        why = "always" if base else ", ".join(f"`{extra}`" for extra in EXTRAS if name in by_extra[extra])
        rows.append(f"| {name} | {declared(metadata.distribution(name))} | {why} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
    print(f"wrote {FILE.relative_to(ROOT)}")
