"""Damaged and invented input for every reader of what others wrote: `make fuzz SECONDS=60`.

Each target has whole files to begin with, which are answered; then they are cut, spliced, flipped and given absurd
values at random. A reader may answer or refuse, by a DensePureError; anything else that it raises, a case that takes
too long or too much memory, and a process that dies are faults. Each target runs in a process of its own, ends with its
share of the time and leaves the input of each fault in runs/fuzz/. Exit code 1 when there is a fault.
"""

from __future__ import annotations

import argparse
import ctypes
import gzip
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from densepure_rt.errors import DensePureError
from densepure_rt.export.models.checkpoints import read_state_dict
from densepure_rt.export.models.programs import refuse_code
from densepure_rt.images import uploads
from densepure_rt.images.datasets import open_images
from densepure_rt.keys import stored_key
from densepure_rt.legacy.claims import import_log
from densepure_rt.legacy.label_arrays import parsed_labels
from densepure_rt.legacy.logs import read_log
from densepure_rt.report.sources import read_results
from densepure_rt.runs.audit import audit
from densepure_rt.runs.layout import read_manifest
from densepure_rt.runtime.bundle import (
    read_sidecar,
    rebuild_command,
    refuse_damaged_plan,
    shipped_engine,
    sidecar_path,
)
from densepure_rt.runtime.tensorrt_device import refuse_other_gpu
from densepure_rt.serving.protocol import Model, Tensor, parse_request
from tests.support.plans import ADA, a_plan, put_bundle

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "runs" / "fuzz"
SHAPE, CLASSES = (1, 6, 5), ("a", "b", "c")
COLOUR = (3, 32, 32)
LONGEST = 5.0  # seconds of a case
MOST_MEMORY = 300 * 2**20  # bytes, beyond what the process held before the case
LATE = 20.0  # seconds after which a process that should have ended is taken for hung

Read = Callable[[Path], object]


class Target(NamedTuple):
    """A reader. seeds: what is damaged, whole. file: where it lies in `around`, a folder of what must lie beside it."""

    name: str
    seeds: Sequence[bytes]
    read: Read
    file: str = "case"
    around: Path | None = None


@dataclass
class Found:
    """Count what became of a target's cases. memory: the most bytes that one case added to those of its process."""

    target: str
    cases: int = 0
    rejected: int = 0
    accepted: int = 0
    worst: float = 0.0
    memory: int = 0
    faults: dict[str, str] = field(default_factory=dict)  # what was raised, and where its input lies


# what damages

ABSURD = [
    *(b"-1", b"0", b"1e999", b"-1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"1.5", b"9" * 400, b"1e-400"),
    *(b"4294967296", b"9223372036854775808", b"[" * 5000, b'"\\ud800"', b'"\\u0000"', b'"../../etc/passwd"', b"'"),
    *(b"\xff\xfe", b"\0", b"\n", b"\t", b",", b'"', b"", b"\r", b"\xe2\x80\xae", b"\x1b]0;x\x07", b"=cmd()"),
]
WORD = re.compile(rb'"[^"\n]{0,200}"|-?[0-9][0-9.eE+-]*|true|false|null|[A-Za-z_]{3,}')
BYTES = [b"\0", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
KINDS = ("flip", "word", "word", "cut", "bytes", "repeat", "drop", "swap")
MOST_STEPS = 5


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Take up to MOST_STEPS steps, each of a kind that is drawn, at places that are drawn."""
    for kind in draw.choices(KINDS, k=draw.randint(1, MOST_STEPS)):
        at, end = sorted((draw.randint(0, len(data)), draw.randint(0, len(data))))
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif kind == "word" and (words := list(WORD.finditer(data))):
            word = draw.choice(words)
            data = data[: word.start()] + draw.choice(ABSURD) + data[word.end() :]
        elif kind == "cut":
            data = data[:end]
        elif kind == "bytes":
            put = draw.choice(BYTES)
            data = data[:at] + put + data[at + len(put) :]
        elif kind == "repeat":
            data = data[:end] + data[at:end] * draw.randrange(4) + data[end:]
        elif kind == "drop":
            data = data[:at] + data[end:]
        elif kind == "swap":
            middle = (at + end) // 2
            data = data[:at] + data[middle:end] + data[at:middle] + data[end:]
    return data


# what is read


def images(shape: tuple[int, int, int]) -> Read:
    def read(path: Path) -> object:
        return [image.pixels.sum() for image in open_images(path, shape, CLASSES)]

    return read


def npz_member(path: Path) -> object:
    """The file as an array of an archive whose checksum is right."""
    with zipfile.ZipFile(path.with_name("a.npz"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, "x.npy")
    return images(SHAPE)(path.with_name("a.npz"))


def upload(path: Path) -> object:
    return uploads.fitted(path.read_bytes(), COLOUR)


MODEL = Model("predict", Tensor("image", "UINT8", (-1, *SHAPE)), (Tensor("label", "INT64", (-1,)),), 16, {})


def request(path: Path) -> object:
    return parse_request(MODEL, path.read_bytes())


def binary_request(path: Path) -> object:
    """The first line is the header that says how long the JSON is."""
    length, _, body = path.read_bytes().partition(b"\n")
    return parse_request(MODEL, body, length.decode("latin-1"))


def run_of(path: Path) -> Path:
    return path.parent


def legacy(path: Path) -> object:
    log = read_log(path)
    return import_log(log, 0.25, 1000, 0.001, (0.0, 0.25)).accuracy_as_printed((0.0, 0.25))


# what there is to begin with


def idx(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def npz(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def npy(array: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array))
    return buffer.getvalue()


def pictures(pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> list[bytes]:
    """One picture in each format, some in several ways."""
    made = []
    ways: list[tuple[str, dict[str, object]]] = [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("BMP", {}),
        ("WEBP", {"lossless": True}),
        ("PPM", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ]
    for name, more in ways:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, name, **more)
        made.append(buffer.getvalue())
    return made


def certified(folder: Path) -> Path:
    """A finished run of three of the images that ship."""
    out = folder / "run"
    command = ["certify", "--steps", "0", "--n", "64", "--max", "3", "--seed", "1", "--threads", "1", "--out", str(out)]
    code = "from densepure_rt.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, check=True, capture_output=True)
    return out


def targets(folder: Path) -> list[Target]:
    """Every target. folder: an empty one, for what lies beside the damaged files."""
    draw = np.random.default_rng(0)
    grey, colour = draw.integers(0, 256, (4, 6, 5), np.uint8), draw.integers(0, 256, (32, 32, 3), np.uint8)
    run, bundle, labelled, listed = certified(folder), folder / "bundle", folder / "labelled", folder / "listed"
    for made in (bundle, labelled, listed):
        made.mkdir()
    (labelled / "images-idx3-ubyte").write_bytes(idx(grey))
    Image.fromarray(grey[0]).save(listed / "0.png")
    body = json.dumps(
        {
            "id": "1",
            "inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, *SHAPE], "data": grey[:1, None].tolist()}],
        }
        | {"outputs": [{"name": "label", "parameters": {"binary_data": False}}], "parameters": {"deadline_ms": 100}}
    ).encode()
    sized = {"name": "image", "datatype": "UINT8", "shape": [1, *SHAPE], "parameters": {"binary_data_size": 30}}
    header = json.dumps({"inputs": [sized]}).encode()
    torch.save({"a.weight": torch.zeros(3, 2), "b": torch.ones(4)}, folder / "w.pt")
    save_file({"a.weight": torch.zeros(3, 2), "b": torch.ones(4)}, folder / "w.safetensors")
    program = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), program)
    log = b"idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.62\t1\t0:00:01.5\n20\t2\t-1\t0.0\t0\t0:00:02\n"
    by_run = [
        Target(name, [(run / name).read_bytes()], lambda path: audit(run_of(path)), name, run)
        for name in ("ledger.sqlite", "results.tsv", "summary.json", "seal.json")
    ]
    sidecars = [
        sidecar_path(shipped_engine().with_name(name)).read_bytes() for name in ("unet.onnx", "classifier.onnx")
    ]
    plan = a_plan("tensorrt", version="10.16.1.11", recipe={"use_dla_core": "0", "hw_compat": "ampere-plus"})
    step_plan = put_bundle(bundle, plan)
    written = sidecar_path(step_plan)

    def plan_sidecar(path: Path) -> None:
        sidecar = read_sidecar(path.with_name(step_plan.name))
        if sidecar.plan is not None:
            refuse_damaged_plan(step_plan.name, sidecar.plan, step_plan.read_bytes())
            refuse_other_gpu(step_plan.name, sidecar.plan, ADA, rebuild_command(step_plan, sidecar))
            assert sidecar.plan.dla_core in (None, *range(100))

    return [
        Target(
            "plan", [step_plan.read_bytes()], lambda path: refuse_damaged_plan("unet.plan", plan, path.read_bytes())
        ),
        Target("plan's sidecar", [written.read_bytes()], plan_sidecar, written.name, bundle),
        Target("request", [body], request),
        Target("binary request", [f"{len(header)}\n".encode() + header + grey[0].tobytes()], binary_request),
        Target(
            "sidecar",
            sidecars,
            lambda path: read_sidecar(path.with_name("unet.onnx")),
            sidecar_path(Path("unet.onnx")).name,
            bundle,
        ),
        *by_run,
        Target(
            "manifest", [(run / "manifest.json").read_bytes()], lambda p: read_manifest(p.parent), "manifest.json", run
        ),
        Target(
            "manifest, audit", [(run / "manifest.json").read_bytes()], lambda p: audit(p.parent), "manifest.json", run
        ),
        Target(
            "results", [(run / "results.jsonl").read_bytes()], lambda p: read_results(p.parent), "results.jsonl", run
        ),
        Target("timing", [(run / "timing.jsonl").read_bytes()], lambda p: read_results(p.parent), "timing.jsonl", run),
        Target("key", [(run / "secret.key").read_bytes() if (run / "secret.key").exists() else b"0" * 64], stored_key),
        Target("IDX", [idx(grey), gzip.compress(idx(grey))], images(SHAPE), "images-idx3-ubyte"),
        Target(
            "IDX labels",
            [idx(np.array([0, 1, 2, 0], np.uint8))],
            lambda path: images(SHAPE)(path.with_name("images-idx3-ubyte")),
            "labels-idx1-ubyte",
            labelled,
        ),
        Target("npz", [npz(x=grey, y=[0, 1, 2, 0]), npz(x=grey / np.float32(255))], images(SHAPE), "a.npz"),
        Target("npz member", [npy(grey), npy(grey / 255)], npz_member),
        Target("CIFAR", [bytes([1]) + bytes(3072)], images(COLOUR), "test_batch.bin"),
        Target("picture", pictures(colour), images(COLOUR), "a.png"),
        Target("upload", pictures(colour)[:5], upload),
        Target("labels.csv", [b"file,label\n0.png,1\n"], lambda p: images(SHAPE)(p.parent), "labels.csv", listed),
        Target("legacy log", [log], legacy, "log.tsv"),
        Target(
            "label array",
            [npy([0, 1, 2]), npy(np.arange(9, dtype=np.uint8))],
            lambda p: parsed_labels(p.read_bytes(), ""),
        ),
        Target("safetensors", [(folder / "w.safetensors").read_bytes()], read_state_dict, "a.safetensors"),
        Target("checkpoint", [(folder / "w.pt").read_bytes()], read_state_dict, "a.pt"),
        Target("program", [program.getvalue()], lambda path: refuse_code(path.read_bytes(), path.name), "a.pt2"),
    ]


# how it is run


class TooLong(BaseException):
    """A case has had its time."""


def too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong


def peak() -> int:
    """Return the most memory that this process has held since `forget_peak`, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def forget_peak() -> None:
    """Set the peak to what is held now: memory that fork brought along and was then freed would hide a case's own."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """Return free memory to the system: a case that is served from what fork brought along would seem to take none."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc
        trim(0)


def one_case(target: Target, path: Path, data: bytes, found: Found) -> None:
    """Write a case, read it and count what came of it."""
    path.write_bytes(data)
    give_back()  # what an earlier case has freed, too
    forget_peak()
    before = peak()
    fault = None
    started = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    try:
        target.read(path)
        found.accepted += 1
    except DensePureError as error:
        found.rejected += 1
        try:
            str(error).encode()
        except UnicodeEncodeError:
            fault = f"an error that cannot be printed: {error!r}"
    except TooLong:
        fault = f"more than {LONGEST:g} s"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}: {str(error)[:80]!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    found.cases += 1
    found.worst = max(found.worst, time.perf_counter() - started)
    grown = peak() - before
    if grown > MOST_MEMORY >= found.memory:
        fault = f"{grown / 2**20:.0f} MiB"
    found.memory = max(found.memory, grown)
    if fault is not None and fault not in found.faults:
        found.faults[fault] = kept(target, data)


def kept(target: Target, data: bytes) -> str:
    """Keep the input of a fault; return where, relative to the checkout."""
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{re.sub('[^a-z0-9]+', '-', target.name.lower())}-{abs(hash(data)) % 10**8:08d}"
    path.write_bytes(data)
    return str(path.relative_to(ROOT))


def attack(target: Target, folder: Path, seconds: float, seed: int) -> None:
    """Run cases until the time is up, and write what was found to found.json in `folder`."""
    place = folder / "place"
    if target.around is None:
        place.mkdir()
    else:
        shutil.copytree(target.around, place)
    found = Found(target.name)
    give_back()
    signal.signal(signal.SIGALRM, too_long)
    warnings.simplefilter("ignore")
    with (folder / "said").open("wb") as said:
        os.dup2(said.fileno(), sys.stderr.fileno())  # decoders in C complain there
    path, draw, end = place / target.file, random.Random(f"{seed} {target.name}"), time.monotonic() + seconds
    for whole in target.seeds:
        one_case(target, path, whole, found)
        if found.rejected:
            found.faults["a whole file is refused"] = kept(target, whole)
            break
    while time.monotonic() < end:
        one_case(target, path, damaged(draw.choice(target.seeds), draw), found)
    (folder / "found.json").write_text(json.dumps(asdict(found)))


def supervised(target: Target, folder: Path, seconds: float, seed: int) -> Found:
    """Attack a target in a process of its own, whose end is a fault when it is not that of `attack`."""
    folder.mkdir()
    process = multiprocessing.get_context("fork").Process(target=attack, args=(target, folder, seconds, seed))
    process.start()
    process.join(seconds + LATE)
    hung = process.is_alive()
    if hung:
        process.kill()
        process.join()
    if (folder / "found.json").exists():
        return Found(**json.loads((folder / "found.json").read_text()))
    last = folder / "place" / target.file
    why = "hangs" if hung else f"the process ended with {process.exitcode}"
    return Found(target.name, faults={why: kept(target, last.read_bytes() if last.exists() else b"")})


def table(all_found: Sequence[Found]) -> str:
    lines = [f"{'target':<16}{'cases':>8}{'rejected':>10}{'accepted':>10}{'worst':>10}{'memory':>10}{'faults':>8}"]
    for found in all_found:
        lines.append(
            f"{found.target:<16}{found.cases:>8}{found.rejected:>10}{found.accepted:>10}{found.worst:>8.2f} s"
            f"{found.memory / 2**20:>6.0f} MiB{len(found.faults):>8}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of all targets together")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time")
    parser.add_argument("--seed", type=int, default=0, help="another one gives other cases")
    parser.add_argument("--only", help="a target by its name")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = [target for target in targets(folder) if options.only in (None, target.name)]
        share = options.seconds * options.jobs / max(len(chosen), options.jobs)
        with ThreadPoolExecutor(options.jobs) as pool:
            asked = [
                pool.submit(supervised, target, folder / str(place), share, options.seed)
                for place, target in enumerate(chosen)
            ]
            all_found = [future.result() for future in asked]
    print(table(all_found))
    faults = [(found.target, what, where) for found in all_found for what, where in found.faults.items()]
    for target, what, where in faults:
        print(f"fault: {target}: {what}; its input is {where}", file=sys.stderr)
    return 1 if faults or not all(found.cases for found in all_found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
