"""Groups of options, on a command of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from densepure_rt.commands.groups import TypedOptions, with_options


@dataclass(frozen=True)
class Colour(TypedOptions):
    red: Annotated[int, typer.Option(help="How red.")] = 1
    green: Annotated[bool, typer.Option("--leafy", help="Green.")] = False


@dataclass(frozen=True)
class Size:
    width: Annotated[float, typer.Option(rich_help_panel="Extent")] = 2.0


@pytest.fixture
def run() -> CliRunner:
    return CliRunner()


def app_of(found: list[object]) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    @with_options
    def paint(
        colour: Colour,
        size: Size,
        what: Annotated[str, typer.Argument()] = "wall",
        twice: Annotated[bool, typer.Option("--twice")] = False,
    ) -> None:
        """Paint it."""
        found[:] = [colour, size, what, twice]

    return app


def test_a_command_gets_each_group_whole_and_its_own_options_beside_them(run: CliRunner) -> None:
    found: list[object] = []
    said = run.invoke(app_of(found), ["fence", "--red", "7", "--leafy", "--width", "3", "--twice"])
    assert said.exit_code == 0, said.output
    assert found == [
        Colour(7, True, typed=frozenset({"red", "green", "width", "what", "twice"})),
        Size(3.0),
        "fence",
        True,
    ]


def test_what_is_not_typed_is_as_the_group_says(run: CliRunner) -> None:
    found: list[object] = []
    assert run.invoke(app_of(found), []).exit_code == 0
    assert found == [Colour(), Size(), "wall", False]


def test_a_value_that_is_typed_as_it_is_by_default_counts_as_typed(run: CliRunner) -> None:
    found: list[object] = []
    assert run.invoke(app_of(found), ["--red", "1"]).exit_code == 0
    assert found[0] == Colour(typed=frozenset({"red"}))


def test_help_has_the_words_and_panels_of_the_fields(run: CliRunner) -> None:
    said = run.invoke(app_of([]), ["--help"]).output
    for words in ("How red.", "Extent", "Paint it."):
        assert words in said
    assert "typed" not in said


def test_two_options_of_one_name_are_refused_when_the_command_is_made() -> None:
    def command(size: Size, width: float = 1.0) -> None: ...

    with pytest.raises(ValueError, match="width"):
        with_options(command)
