"""What an installation resolves to: `make lock` writes the pins, `make check-install` resolves everything.

Both see the package index as a stranger's machine does: metadata alone, no configuration of this machine, no local
wheels and no second index. Only what the way to the index needs (certificates, a proxy) is kept of the environment.
Uses the standard library and uv.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
# glibc 2.28 is RHEL 8's, and what the wheels of torch ask for. The Jetsons' JetPack 6 is Ubuntu 22.04: 2.35.
PLATFORMS = {"x86_64": "x86_64-manylinux_2_28", "aarch64": "aarch64-manylinux_2_35"}
DEVELOPMENT = ("cpu", "export", "report", "cluster", "serve", "dev")
GPU_BOX = "gpu-box"
PINS = {12: "constraints-cuda12.txt", 13: "constraints.txt"}
# Held while locking. PyPI's torch 2.13 is built for CUDA 13 and needs cuda-bindings 13; torch 2.10 is the last one
# there that is built for CUDA 12 (Requires-Dist in their metadata).
LOCKS = {
    "constraints.txt": ("torch==2.13.0",),
    "constraints-cuda12.txt": ("torch==2.10.0", "cuda-bindings<13"),
}
SERVES = {
    "constraints.txt": "`make demo`, `make lint` and `make test` install, and every extra for drivers of CUDA 13",
    "constraints-cuda12.txt": "`make test-gpu` installs for drivers of CUDA 12, and every extra for them",
}
# Whose pins would contradict those of the rest: those of a Jetson.
UNPINNED = re.compile(r"tensorrt-jetpack[67]")
OF_THE_OTHER_CUDA = {
    "constraints.txt": re.compile(r"(gpu|tensorrt|tensorrt-lean)-(cu|cuda)12"),
    "constraints-cuda12.txt": re.compile(r"(gpu|tensorrt|tensorrt-lean)(-cu13)?"),
}
# The pins of HASHED_FROM for these extras, with the hashes of their files: what the edge installs. Not TensorRT:
# NVIDIA's packages fetch what they install without a hash. torch and Ray are of other machines.
HASHED, HASHED_FROM = "requirements-edge.txt", "constraints.txt"
HASHED_EXTRAS = ("cpu", "serve")
# NVIDIA publishes these as source alone: packages without code, which fetch NVIDIA's wheels when they are installed.
SOURCE_ALONE = (
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu12-libs",
    "tensorrt-cu13",
    "tensorrt-cu13-libs",
    "tensorrt-lean-cu12",
    "tensorrt-lean-cu13",
    "tensorrt-rtx-cu12",
)
# What cannot be had, with the reason. It fails the check when it can be had after all.
X86_ALONE = "has wheels for x86-64 alone"
NO_WHEELS: dict[tuple[str, ...], str] = {
    ("tensorrt-rtx", "aarch64"): f"tensorrt-rtx-cu12 {X86_ALONE}",
    ("tensorrt-cu12", "aarch64"): f"tensorrt-cu12-bindings {X86_ALONE}; JetPack brings its own",
    ("tensorrt-cuda12", "aarch64"): "it is tensorrt-cu12",
    ("tensorrt-lean-cu12", "aarch64"): f"tensorrt-lean-cu12-libs {X86_ALONE}",
    ("gpu-cu12", "aarch64"): f"onnxruntime-gpu for CUDA 12 {X86_ALONE}",
    ("gpu-cu13", "aarch64", "3.10"): f"onnxruntime-gpu for Python 3.10 {X86_ALONE}",
    ("gpu", "aarch64", "3.10"): "it is gpu-cu13",
}
KEPT = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
)
CERTIFICATES = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
AT_ONCE = 8  # resolutions wait for the network, not for a core


@dataclass(frozen=True)
class Install:
    """Extras that are installed together, and the constraints file beside them, if any."""

    name: str
    extras: tuple[str, ...]
    constraints: str | None = None


def extras() -> tuple[str, ...]:
    """The names of the optional dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return tuple(project["optional-dependencies"])


def installs() -> tuple[Install, ...]:
    """Every extra alone, as pip takes it, and what the Makefile installs."""
    return (
        *(Install(f"[{extra}]", (extra,)) for extra in extras()),
        Install("make demo", ("cpu",), "constraints.txt"),
        Install("make test, lint", DEVELOPMENT, "constraints.txt"),
        *(
            Install(
                f"make test-gpu, CUDA {cuda}",
                (f"gpu-cu{cuda}", f"tensorrt-lean-cu{cuda}", f"tensorrt-cu{cuda}", GPU_BOX),
                pins,
            )
            for cuda, pins in PINS.items()
        ),
    )


def stranger(home: Path) -> dict[str, str]:
    """An environment without this machine's configuration; `home` is an empty folder."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    # pip brings certificates of its own, and is told of others by a variable; uv reads SSL_CERT_FILE.
    for name in CERTIFICATES:
        if name in os.environ and "SSL_CERT_FILE" not in kept:
            kept["SSL_CERT_FILE"] = os.environ[name]
    folders = {f"XDG_{kind}_HOME": str(home / kind) for kind in ("CONFIG", "DATA", "CACHE")}
    return kept | folders | {"HOME": str(home), "PATH": os.defpath, "XDG_CONFIG_DIRS": str(home / "etc")}


def compile_command(uv: str, chosen: Sequence[str], constraints: Path | None) -> list[str]:
    """`uv pip compile` of these extras."""
    words = [uv, "pip", "compile", "--no-config", "--quiet", "--python", sys.executable]
    words += ["--prerelease", "explicit", "--no-header", "--no-annotate", str(ROOT / "pyproject.toml")]
    words += [word for extra in chosen for word in ("--extra", extra)]
    return words + ([] if constraints is None else ["--constraints", str(constraints)])


def wheels_only() -> Iterator[str]:
    """Options that refuse to build anything from source, but for NVIDIA's packages without code."""
    yield from ("--only-binary", ":all:")
    for name in SOURCE_ALONE:
        yield from ("--no-binary", name)


def run(command: Sequence[str], home: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = stranger(home) | {"UV_CACHE_DIR": str(cache)}
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)


def lock(uv: str, home: Path, cache: Path) -> int:
    """Write the constraints files, then the hashes of what the edge installs of them."""
    for name, held in LOCKS.items():
        inputs = home / "held.txt"
        inputs.write_text("".join(f"{line}\n" for line in held))
        others = OF_THE_OTHER_CUDA[name]
        chosen = [extra for extra in extras() if not (others.fullmatch(extra) or UNPINNED.fullmatch(extra))]
        command = [*compile_command(uv, chosen, inputs), "--universal", "--python-version", PYTHONS[0]]
        done = run(command, home, cache)
        if done.returncode:
            print(f"{name} cannot be resolved:\n{done.stderr.strip()}", file=sys.stderr)
            return 1
        header = (
            f"# What {SERVES[name]}.\n"
            f"# Made by `make lock` for Python {PYTHONS[0]} to {PYTHONS[-1]}, Linux on x86-64 and aarch64, "
            f"while it held\n"
            f"# {' and '.join(held)}: do not edit. A CPU build of the same torch fits too.\n"
        )
        (ROOT / name).write_text(header + done.stdout)
        print(f"wrote {name}, {len(done.stdout.splitlines())} pins")
    return write_hashed(uv, home, cache)


def hashed_pins(uv: str, home: Path, cache: Path) -> str:
    """Return the text of HASHED as the constraints file of today has it. Raises ValueError where it has none."""
    command = compile_command(uv, HASHED_EXTRAS, ROOT / HASHED_FROM)
    done = run([*command, "--universal", "--python-version", PYTHONS[0], "--generate-hashes"], home, cache)
    if done.returncode:
        raise ValueError(f"{HASHED} cannot be resolved:\n{done.stderr.strip()}")
    header = (
        f"# What [{','.join(HASHED_EXTRAS)}] installs, with the hashes of PyPI's files; the pins are those of "
        f"{HASHED_FROM}.\n"
        f"# Made by `make lock`: do not edit.\n"
        f"# pip install --require-hashes -r {HASHED}, then the wheel with --no-deps.\n"
    )
    return header + done.stdout


def write_hashed(uv: str, home: Path, cache: Path) -> int:
    """Write HASHED."""
    try:
        text = hashed_pins(uv, home, cache)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    (ROOT / HASHED).write_text(text)
    print(f"wrote {HASHED}, {sum(line[0] not in ' #' for line in text.splitlines())} pins")
    return 0


def check_hashed(uv: str, home: Path, cache: Path) -> int:
    """Say whether HASHED holds the pins of the constraints file, with hashes that the index still gives."""
    try:
        expected = hashed_pins(uv, home, cache)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    # A release may get more files after the lock was made; those that were locked stay what they were.
    lines, found = expected.splitlines(), (ROOT / HASHED).read_text().splitlines()
    lacking = [line.strip() for line in found if line.rstrip(" \\") not in {line.rstrip(" \\") for line in lines}]
    unpinned = [line for line in lines if "==" in line and line not in found]
    if lacking or unpinned:
        print(f"{HASHED} is not what `make lock` writes: {(lacking + unpinned)[0]}", file=sys.stderr)
        return 1
    print(f"{HASHED}: its pins are those of {HASHED_FROM}, its hashes those of the index")
    return 0


@dataclass(frozen=True)
class Cell:
    """One resolution: what, for which Python and machine, and how it went (None: it resolves)."""

    install: Install
    python: str
    machine: str
    error: str | None

    @property
    def expected_error(self) -> str | None:
        wanted = [(extra, *where) for extra in self.install.extras for where in self.places]
        return next((NO_WHEELS[each] for each in wanted if each in NO_WHEELS), None)

    @property
    def places(self) -> tuple[tuple[str, ...], ...]:
        return (self.machine,), (self.machine, self.python)

    @property
    def passed(self) -> bool:
        return (self.error is None) == (self.expected_error is None)

    @property
    def word(self) -> str:
        if self.passed:
            return "ok" if self.error is None else "none"
        return "FAILS" if self.error is not None else "EXISTS"


def resolve(uv: str, install: Install, python: str, machine: str, home: Path, cache: Path) -> Cell:
    constraints = None if install.constraints is None else ROOT / install.constraints
    command = [*compile_command(uv, install.extras, constraints), *wheels_only()]
    done = run([*command, "--python-version", python, "--python-platform", PLATFORMS[machine]], home, cache)
    return Cell(install, python, machine, brief(done.stderr) if done.returncode else None)


def brief(said: str) -> str:
    """What uv says, without the log of a build."""
    return said.partition("[stderr]")[0].strip() or "no message"


def check(uv: str, home: Path, cache: Path) -> int:
    """Resolve everything and print a table."""
    columns = [(machine, python) for machine in PLATFORMS for python in PYTHONS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = {
            install: [pool.submit(resolve, uv, install, python, machine, home, cache) for machine, python in columns]
            for install in installs()
        }
        cells = {install: [future.result() for future in futures] for install, futures in rows.items()}
    width = max(len(install.name) for install in cells)
    for machine in PLATFORMS:
        print(f"{machine:<{width}}  {'  '.join(f'{python:<6}' for python in PYTHONS)}")
        for install, row in cells.items():
            print(f"{install.name:<{width}}  {'  '.join(f'{c.word:<6}' for c in row if c.machine == machine)}")
        print()
    for (extra, *where), reason in NO_WHEELS.items():
        print(f"none: [{extra}] on {' with Python '.join(where)}: {reason}")
    failed = [cell for row in cells.values() for cell in row if not cell.passed]
    for cell in failed:
        what = cell.error or f"resolves, though {cell.expected_error}: take it out of NO_WHEELS"
        print(f"\n{cell.install.name} for Python {cell.python} on {cell.machine}: {what}", file=sys.stderr)
    total = sum(map(len, cells.values()))
    print(f"{total - len(failed)} of {total} resolutions as expected")
    return 1 if failed else 0


def pip_dry_run(install: Install, home: Path) -> int:
    """What pip itself makes of it for this Python and machine, without installing anything."""
    (home / "pip.conf").touch()
    environment = stranger(home) | {"PIP_CONFIG_FILE": str(home / "pip.conf")}
    if "SSL_CERT_FILE" in environment:
        environment["PIP_CERT"] = environment["SSL_CERT_FILE"]
    target = f"{ROOT}[{','.join(install.extras)}]"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--no-cache-dir"]
    command += ["--disable-pip-version-check"]
    command += [] if install.constraints is None else ["--constraint", str(ROOT / install.constraints)]
    done = subprocess.run([*command, target], cwd=home, env=environment, capture_output=True, text=True)
    print(f"pip, {install.name}: {'FAILS' if done.returncode else 'ok'}")
    if done.returncode:
        print(done.stderr.strip(), file=sys.stderr)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.installs", description=__doc__)
    parser.add_argument("what", choices=("lock", "lock-hashes", "check"))
    parser.add_argument("--uv", type=Path, required=True, help="the uv to run")
    parser.add_argument("--cache", type=Path, default=ROOT / ".venv-tools" / "cache", help="uv's cache")
    parser.add_argument("--pip-test", action="store_true", help="let pip resolve `make test` too; downloads 2.7 GB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home, cache, uv = Path(folder), options.cache.absolute(), str(options.uv.absolute())
        if options.what == "lock":
            return lock(uv, home, cache)
        if options.what == "lock-hashes":
            return write_hashed(uv, home, cache)
        asked = {"make demo"} | ({"make test, lint"} if options.pip_test else set())
        pip = [pip_dry_run(install, home) for install in installs() if install.name in asked]
        return max(check(uv, home, cache), check_hashed(uv, home, cache), *map(bool, pip))


if __name__ == "__main__":
    raise SystemExit(main())
