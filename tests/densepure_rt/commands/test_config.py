"""Options in a file: what --save-config writes --config reads, and what is typed counts before it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.commands.config import read_config, write_config
from densepure_rt.text import all_printable
from tests.support.cli import densepure_rt as cli

DRY = ("certify", "--dry-run", "--json", "--batch", 4, "--threads", 1)
TINY = ("--steps", 0, "--votes", 1, "--n", 100, "--sigma", 0.1, "--max", 1, "--batch", 16, "--threads", 1)


@given(st.dictionaries(st.sampled_from(["sigma", "run-budget", "n"]), st.text() | st.integers() | st.booleans()))
def test_what_is_written_is_read_again(options: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder, "how.toml"), options)
        found = read_config(Path(folder, "how.toml"))
    assert found == all_printable(options)


def test_a_run_of_a_saved_config_is_the_same_run(tmp_path: Path) -> None:
    config = tmp_path / "how.toml"
    first = cli("certify", *TINY, "--seed", 1, "--run-budget", "2h", "--out", tmp_path / "a", "--save-config", config)
    assert first.returncode == 0, first.stderr
    found = read_config(config)
    assert {name: found[name] for name in ("sigma", "max", "run-budget", "seed")} == {
        "sigma": 0.1,
        "max": 1,
        "run-budget": "2h",
        "seed": 1,
    }
    second = cli("certify", "--config", config, "--out", tmp_path / "b")
    assert second.returncode == 0, second.stderr
    results = [(tmp_path / run / "results.jsonl").read_bytes() for run in "ab"]
    identities = [json.loads((tmp_path / run / "manifest.json").read_text())["identity_sha256"] for run in "ab"]
    assert (results[0], identities[0]) == (results[1], identities[1])


def test_what_is_typed_counts_before_the_file(tmp_path: Path) -> None:
    config = tmp_path / "how.toml"
    config.write_text('max = 3\nradii = [0, 0.25]\nsigma = 0.25\n"quiet" = true\n')
    found = cli(*DRY, "--config", config)
    assert found.returncode == 0, found.stderr
    assert (json.loads(found.stdout)["images"], found.stderr) == (3, "")
    assert [radius for radius, _ in json.loads(found.stdout)["radii"]] == [0, 0.25]
    assert json.loads(cli(*DRY, "--config", config, "--max", 2).stdout)["images"] == 2


def test_a_preset_of_the_file_gives_way_to_what_else_it_says(tmp_path: Path) -> None:
    (tmp_path / "how.toml").write_text('preset = "paper"\nn = 500\nmax = 1\n')
    found = cli(*DRY, "--config", tmp_path / "how.toml", "--method", "fixed")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["samples"] == [600, 600, 600]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sigma = ", "is no TOML file"),
        ("sigma = 1\nsigma = 2", "is no TOML file"),
        ("sigmas = 1", 'names "sigmas", which is no option'),
        ("run_budget = '1h'", 'names "run_budget", which is no option'),
        ('"a\\u001b" = 1', 'names "a\\x1b", which is no option'),
        ("n = 1.5", "--n"),
        ("n = true", "--n"),
        ('out = "runs/a"', "gives out, which belongs to one call: type --out instead"),
        ("[smoothing]\nsigma = 1", "gives smoothing no value that an option has"),
        ("radii = [[0]]", "gives radii no value that an option has"),
        ("sigma = 2020-01-01", "gives sigma no value that an option has"),
    ],
)
def test_a_file_that_is_none_of_options_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "how.toml").write_text(text)
    done = cli(*DRY, "--config", tmp_path / "how.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: {tmp_path / 'how.toml'}" in done.stderr
    assert says in done.stderr
    assert "\x1b" not in done.stderr


def test_a_file_that_cannot_be_read_or_written_is_said(tmp_path: Path) -> None:
    assert "no file at" in cli(*DRY, "--config", tmp_path / "none.toml").stderr
    assert cli(*DRY, "--config", tmp_path).returncode == 3
    done = cli(*DRY, "--save-config", tmp_path / "no" / "how.toml")
    assert done.returncode == 3
    assert "choose another file with --save-config" in done.stderr
