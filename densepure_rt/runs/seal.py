"""Seal a finished run by the hashes of its files, and check a seal."""

from __future__ import annotations

from pathlib import Path

from densepure_rt import files
from densepure_rt.errors import CheckFailed
from densepure_rt.json_files import page, parsed, replaced
from densepure_rt.runs.layout import ATTACKS, SEAL, SEALED
from densepure_rt.runs.ledger import NAME as LEDGER
from densepure_rt.runs.ledger import Ledger
from densepure_rt.runs.records import Seal


def seal(path: Path, ledger: Ledger) -> None:
    """Write down what the files of a complete run hash to."""
    replaced(path / SEAL, page(Seal(hashes(path, ledger))))


def refuse_broken_seal(path: Path, ledger: Ledger) -> None:
    """Raise CheckFailed when the folder is not what was sealed."""
    claimed, found = parsed(Seal, files.content(path / SEAL, "run file"), str(path / SEAL)).sha256, hashes(path, ledger)
    if changed := [name for name in found if claimed.get(name) != found[name]]:
        raise CheckFailed(
            f"{', '.join(changed)} in {path} was changed after the run was sealed: see densepure-rt audit"
        )


def hashes(path: Path, ledger: Ledger) -> dict[str, str]:
    """Compute the content of a seal: the SHA-256 of each file of a run."""
    names = (*SEALED, *((ATTACKS,) if (path / ATTACKS).exists() else ()))
    found = {name: files.sha256_of(path / name, "results file") for name in names}
    return found | {LEDGER: ledger.content_sha256()}
