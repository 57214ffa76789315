"""Engines and their sidecars, written beside a folder's own and moved into it together at the end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from densepure_rt.errors import DensePureError, EnvironmentFault, UsageError
from densepure_rt.runtime.bundle import FileRef, Sidecar, read_sidecar, sha256_of, sidecar_path, to_json

DATA_SUFFIX = ".data"  # of the file of weights beside a graph that is too large to hold them
LARGE = 3 << 29  # bytes of weights from which they lie in a file beside the graph; protobuf ends at 2 GiB


def file_names(kind: str) -> tuple[str, str]:
    """The step engine's name and the classifier's: unet.onnx, or unet.fp16.onnx and so on."""
    suffix = ".onnx" if kind == "fp32" else f".{kind}.onnx"
    return "unet" + suffix, "classifier" + suffix


def data_path(path: Path) -> Path:
    """Return the path of weights that are too large for their graph: unet.onnx.data beside unet.onnx."""
    return path.with_name(path.name + DATA_SUFFIX)


def data_ref(path: Path) -> FileRef | None:
    """The file of weights beside a graph, if it has one."""
    data = data_path(path)
    return FileRef(data.name, sha256_of(data)) if data.exists() else None


class Publication:
    """Write files into `folder` and `add` each: when the `with` block ends well they appear in `out`, else none does.

    They appear in the order in which they were added: add what others name first.

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

    def write(self, name: str, content: bytes) -> FileRef:
        """Write a file into `folder`, not yet to appear."""
        with self.writing():
            (self.folder / name).write_bytes(content)
            return FileRef(name, sha256_of(self.folder / name))

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let what is written into `folder` by other means than `write` fail in the same words."""
        try:
            yield
        except OSError as error:
            raise self._fault(error) from error

    def add(self, sidecar: Sidecar) -> None:
        """Let the file that `sidecar` is about appear, with its weights and with the sidecar itself."""
        path = sidecar_path(self.folder / sidecar.file.name)
        with self.writing():
            path.write_text(to_json(sidecar), encoding="utf-8")
        weights = [] if sidecar.data is None else [sidecar.data.name]
        self.names += [*weights, sidecar.file.name, path.name]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for name in self.names:
                    os.replace(self.folder / name, self.out / name)
                for name in {name + DATA_SUFFIX for name in self.names}.difference(self.names):
                    (self.out / name).unlink(missing_ok=True)  # of an engine that was replaced by a smaller one
        except OSError as fault:
            raise self._fault(fault) from fault
        finally:
            self._temporary.cleanup()

    def _fault(self, error: OSError) -> EnvironmentFault:
        return EnvironmentFault(
            f"cannot write {self.out} ({error.strerror or error}): choose another folder with `out`"
        )


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
                f"choose another `out`, or replace it with `force`"
            )
