"""Files and their sidecars, written beside a folder's own and moved into it together at the end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from densepure_rt.errors import DensePureError, EnvironmentFault, UsageError
from densepure_rt.runtime.bundle import FileRef, Sidecar, read_sidecar, sha256_of, sidecar_path, to_json


class Publication:
    """`with Publication(out) as p: p.write(...)`: when the block ends well its files appear in `out`, else none does.

    Files appear in the order in which they were written: write what others name first.

    Raises EnvironmentFault when `out` cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.names: list[str] = []

    def __enter__(self) -> Publication:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._temporary = tempfile.TemporaryDirectory(prefix=".export-", dir=self.out)
        except OSError as error:
            raise self._fault(error) from error
        self.folder = Path(self._temporary.name)
        return self

    def write(self, name: str, content: bytes, sidecar: Callable[[FileRef], Sidecar]) -> FileRef:
        """Write a file and the sidecar that is made for it."""
        try:
            (self.folder / name).write_bytes(content)
            ref = FileRef(name, sha256_of(self.folder / name))
            sidecar_path(self.folder / name).write_text(to_json(sidecar(ref)), encoding="utf-8")
        except OSError as error:
            raise self._fault(error) from error
        self.names.append(name)
        return ref

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for name in self.names:
                    os.replace(self.folder / name, self.out / name)
                    os.replace(sidecar_path(self.folder / name), sidecar_path(self.out / name))
        except OSError as fault:
            raise self._fault(fault) from fault
        finally:
            self._temporary.cleanup()

    def _fault(self, error: OSError) -> EnvironmentFault:
        return EnvironmentFault(f"cannot write {self.out} ({error.strerror}): choose another folder with --out")


def refuse_replacement(out: Path, weights: dict[str, str]) -> None:
    """Raise UsageError when `out` holds a bundle of other weights."""
    for name, digest in weights.items():
        if not sidecar_path(out / name).exists():
            continue
        try:
            found = read_sidecar(out / name).weights_sha256
        except DensePureError:
            found = "unreadable"
        if found != digest:
            raise UsageError(
                f"{out / name} is a bundle of another model (weights {found[:16]}, not {digest[:16]}): "
                f"choose another --out, or replace it with --force"
            )
