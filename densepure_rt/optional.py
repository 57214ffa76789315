"""Optional packages: whatever goes wrong when one is imported is one error that names it and the cure."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from densepure_rt.errors import DensePureError, EnvironmentFault, causes, raise_interrupt

SITE = ("site-packages", "dist-packages")
OURS = "densepure_rt"


@contextmanager
def optional(what: str, packages: str, cure: str) -> Iterator[None]:
    """Imports below `with` that fail become one EnvironmentFault.

    Args:
        what: What needs them, such as "export".
        packages: What is needed, such as "PyTorch".
        cure: The command or step that mends it, where nothing better is known from the failure.

    Raises:
        EnvironmentFault: For any exception of an import; an error of this package itself passes unchanged.
    """
    try:
        yield
    except DensePureError:
        raise
    except Exception as error:  # a package may fail with anything: a library that does not load, an operator not there
        raise_interrupt(error)
        raise EnvironmentFault(explained(error, what, packages, cure)) from error


def explained(error: Exception, what: str, packages: str, cure: str) -> str:
    """Put a failed import into words: what needs what, the first cause in a line, and the cure."""
    *_, first = causes(error)
    if isinstance(first, ModuleNotFoundError) and first.name == "torchvision":
        return (
            f"{what} needs torchvision, which is not installed: install the build for the torch that is here, "
            f"from the same index"
        )
    if (cause := torchvision_at_fault(error)) is not None:
        return f"{what}: {torchvision_cure(cause)}"
    if isinstance(first, ModuleNotFoundError) and first.name and "." not in first.name:
        return f"{what} needs {packages}, and {first.name} is not installed: {cure}"
    if isinstance(first, ImportError):
        return f"{what} needs {packages} ({import_cause(error)}): {cure}"
    return (
        f"{what} needs {packages}, and {failing_package(error) or packages} fails when it is imported "
        f"({import_cause(error)}): install it anew, in versions that fit each other: {cure}"
    )


def import_cause(error: BaseException) -> str:
    """Return the first cause in one line, with its type unless it is an ImportError."""
    *_, first = causes(error)
    line = next((line.strip() for line in str(first).splitlines() if line.strip()), "")
    if isinstance(first, ImportError) and line:
        return line
    return f"{type(first).__name__}: {line}" if line else type(first).__name__


def packages_in(error: BaseException) -> list[str]:
    """List the installed packages whose files the first cause came through, the outermost first."""
    *_, first = causes(error)
    found: list[str] = []
    for frame in traceback.extract_tb(first.__traceback__):
        parts = Path(frame.filename).parts
        for site in SITE:
            if site in parts:
                found.append(Path(parts[parts.index(site) + 1]).stem)
    return found


def failing_package(error: BaseException) -> str | None:
    """Return the innermost installed package in the first cause's traceback."""
    found = [name for name in packages_in(error) if name != OURS]
    return found[-1] if found else None


def torchvision_at_fault(error: BaseException) -> str | None:
    """Return why torchvision failed when it was imported, or None when it did not: its builds fit one torch each."""
    *_, first = causes(error)
    if isinstance(first, ModuleNotFoundError) and (first.name or "").partition(".")[0] == "torchvision":
        return None  # it is missing, which is another matter
    through = any("torchvision" in Path(frame.filename).parts for frame in traceback.extract_tb(first.__traceback__))
    return import_cause(error) if through or "torchvision" in str(first) else None


def torchvision_cure(cause: str) -> str:
    """Name the versions that are here, and say what to do."""
    versions = {}
    for name in ("torch", "torchvision"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "(unknown version)"
    return (
        f"torchvision {versions['torchvision']} cannot be imported beside torch {versions['torch']} ({cause}): install "
        f"the torchvision that was built for this torch, from the index that torch came from, or run "
        f'"pip uninstall torchvision"'
    )
