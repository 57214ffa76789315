"""Somebody's own UNet and classifier, from their files to certificates, through the command line alone.

The classifiers and the images are real. The UNets are of the published layouts with random weights: no weights of a
diffusion network can be had here. Random weights purify nothing, so this checks the plumbing, not accuracy; accuracy is
looked at where no UNet is run (`--steps 0`), and there it must be the classifier's.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from PIL import Image

from densepure_rt.cli import main
from densepure_rt.export.models.openai_unet import PUBLISHED, Architecture, Heads, OpenAIUNet, Published
from densepure_rt.runtime.bundle import sha256_of
from tests.support import packaged_classifiers as packaged
from tests.support.diffusers_folder import small_unet

pytestmark = packaged.needs_packages

ROOT = Path(__file__).resolve().parent.parent
CIFAR, IMAGENET = PUBLISHED
MODULE = """
    from tests.support.packaged_classifiers import cifar_10_model, efficientnet_lite0, silabs_resnet
"""
LEVELS_128 = "--pixel-range 0,255 --mean 128 --std 128".split()  # what silabs_resnet was trained on
LEVELS = "--pixel-range 0,255".split()  # cifar_10_model
LEVELS_127 = "--pixel-range 0,255 --mean 127 --std 128".split()  # efficientnet_lite0
NAMES = "airplane automobile bird cat deer dog frog horse ship truck".split()
FEW = "--n0 1 --n 4 --alpha 0.1".split()  # samples, so few that hardly anything is certified
QUICK = "--parity-images 2 --parity-samples 2".split()
ENGINES = ["classifier.onnx", "classifier.onnx.json", "unet.onnx", "unet.onnx.json"]
MEMORY_GIB = 16  # that an export of the largest published network may take
Done = CompletedProcess[str]


@dataclass(frozen=True)
class Workplace:
    """A folder with somebody's files, and the commands that are typed in it."""

    folder: Path

    def __call__(self, *arguments: object) -> Done:
        """`densepure-rt ARGUMENTS` in this process; it must end well."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", ["densepure-rt", *map(str, arguments)])
            with pytest.raises(SystemExit) as ended:
                main()
        assert not ended.value.code, err.getvalue()
        return Done(sys.argv, 0, out.getvalue(), err.getvalue())

    def alone(self, *arguments: object) -> Done:
        """As calling it, in a fresh interpreter."""
        command = [sys.executable, "-c", "from densepure_rt.cli import main; main()", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=environment, timeout=7200)
        assert done.returncode == 0, done.stderr
        return done

    def sidecar(self, engine: str) -> dict[str, Any]:
        """The sidecar as `inspect` gives it, the file's hash found to be the one that it names."""
        report: dict[str, Any] = json.loads(self("inspect", engine, "--json").stdout)
        assert report["check"]["matches"]
        return report

    def certify(self, out: str, *arguments: object) -> list[dict[str, str]]:
        """The rows of results.tsv of a run of one thread, with a public seed; every sample must be finite."""
        done = self("certify", "--method", "fixed", *arguments, "--out", out, "--seed", 1, "--threads", 1)
        assert "NaN" not in done.stderr
        with (self.folder / out / "results.tsv").open(newline="") as lines:
            return list(csv.DictReader(lines, delimiter="\t"))

    def save_images(self, name: str, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        (self.folder / name).mkdir()
        rows = ["file,label"]
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            Image.fromarray(image.transpose(1, 2, 0)).save(self.folder / name / f"{i:02}.png")
            rows.append(f"{i:02}.png,{label}")
        (self.folder / name / "labels.csv").write_text("\n".join(rows) + "\n")

    def save_unet(self, name: str, architecture: Architecture, heads: Heads) -> Path:
        torch.manual_seed(0)
        torch.save(OpenAIUNet(architecture, heads).state_dict(), self.folder / name)
        return self.folder / name


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    """With 20 images of CIFAR-10's test set and two photographs with ImageNet labels; gigabytes are not kept."""
    place = Workplace(tmp_path_factory.mktemp("own"))
    place.save_images("cifar", *packaged.cifar10_images())
    pixels, labels = packaged.imagenet_images()
    place.save_images("imagenet", pixels[:2], labels[:2])
    (place.folder / "my_classifiers.py").write_text(textwrap.dedent(MODULE))
    yield place
    sys.modules.pop("my_classifiers", None)
    shutil.rmtree(place.folder)


def right(rows: list[dict[str, str]]) -> int:
    return sum(row["predict"] == row["label"] for row in rows)


# A narrow UNet of 3x32x32


@pytest.fixture(scope="module")
def narrow(work: Workplace) -> list[str]:
    """An unpublished checkpoint, and what has to be said of it."""
    architecture = Architecture(3, 32, (32, 32), 1, (False, False), "conv", True, True)
    work.save_unet("ema_0.9999_100000.pt", architecture, Heads(channels=16))
    return (
        "--unet ema_0.9999_100000.pt --num-head-channels 16 --schedule cosine --diffusion-steps 4000 --image-size 32"
    ).split()


@pytest.fixture(scope="module")
def function(work: Workplace, narrow: list[str]) -> str:
    """The engine made of the narrow UNet and a function of somebody's module, exported in a fresh interpreter."""
    given = ["--classifier", "my_classifiers:silabs_resnet", *LEVELS_128, "--timestep-rule", "densepure"]
    done = work.alone("export", *narrow, *given, "--images", "cifar", *QUICK, "--out", "function")
    assert "wrote" in done.stdout
    return "function/unet.onnx"


@pytest.fixture(scope="module")
def file(work: Workplace, narrow: list[str]) -> str:
    """The engine made of the narrow UNet and a classifier that is an ONNX file."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside the exporter
        program = torch.onnx.export(
            packaged.cifar_10_model().eval(),
            (torch.zeros(2, 3, 32, 32),),
            dynamo=True,
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    assert program is not None
    onnx.save(program.model_proto, work.folder / "classifier.onnx")
    (work.folder / "labels.txt").write_text("\n".join(NAMES))
    given = ["--classifier", "classifier.onnx", *LEVELS, "--labels", "labels.txt"]
    work("export", *narrow, *given, *QUICK, "--out", "file")
    return "file/unet.onnx"


def test_bundle_says_what_it_was_made_of(work: Workplace, function: str, file: str) -> None:
    for name in ("function", "file"):
        assert sorted(path.name for path in (work.folder / name).iterdir()) == ENGINES
    unet, classifier = (work.sidecar(f"function/{name}.onnx") for name in ("unet", "classifier"))
    assert (unet["image"], unet["prediction"], unet["variance"]) == ([3, 32, 32], "epsilon", "learned_range")
    assert (unet["schedule"]["name"], unet["schedule"]["steps"]) == ("cosine", 4000)
    assert (unet["schedule"]["timestep_scale"], unet["timestep_rule"]) == (0.25, "densepure")
    assert unet["weights_sha256"] == sha256_of(work.folder / "ema_0.9999_100000.pt")
    assert unet["accuracy"]["relative_l2"] <= 1e-5
    assert classifier["accuracy"]["relative_l2"] <= 1e-5
    assert (classifier["preprocessing"]["scale"], classifier["preprocessing"]["mean"]) == ([0, 255], [128])
    assert classifier["class_names"] == [str(label) for label in range(10)]
    classifier = work.sidecar("file/classifier.onnx")
    assert (classifier["class_names"], work.sidecar(file)["timestep_rule"]) == (NAMES, "nearest")
    assert classifier["weights_sha256"] == sha256_of(work.folder / "classifier.onnx")


def test_every_image_is_voted_on(work: Workplace, function: str) -> None:
    engine = ("--engine", function, "--images", "cifar", "--batch", 20, "--steps", 2, "--votes", 3, "--sigma", 0.25)
    assert "(densepure's rule)" in work("certify", "--dry-run", *engine, "--n", 20).stderr
    rows = work.certify("voted", *engine, *FEW)
    assert [row["idx"] for row in rows] == [str(idx) for idx in range(20)]
    records = [json.loads(line) for line in (work.folder / "voted" / "results.jsonl").read_text().splitlines()]
    assert [record["idx"] for record in records] == list(range(20))


def test_without_a_step_the_classifier_keeps_its_answers(work: Workplace, function: str) -> None:
    engine = ("--engine", function, "--images", "cifar", "--batch", 20)
    plain = work.certify("plain", *engine, "--sigma", 0.01, "--steps", 0, "--n0", 10, "--n", 100)
    print(f"silabs_resnet, sigma 0.01: {right(plain)} of 20 right")
    assert right(plain) >= 15
    assert all(float(row["radius"]) > 0 for row in plain if row["predict"] != "-1")


def test_one_step_at_little_noise_leaves_most_answers(work: Workplace, function: str) -> None:
    """Near timestep 0 little is taken off an image, whatever the UNet says: were scales or channels wrong, few answers
    would survive."""
    engine = ("--engine", function, "--images", "cifar", "--batch", 20)
    rows = work.certify("one-shot", *engine, "--sigma", 0.01, "--steps", 1, "--n0", 2, "--n", 20)
    print(f"narrow UNet and silabs_resnet, sigma 0.01, one step: {right(rows)} of 20 right")
    assert right(rows) >= 13


def test_onnx_file_is_voted_on_too(work: Workplace, file: str) -> None:
    engine = ("--engine", file, "--images", "cifar", "--batch", 20, "--steps", 2, "--votes", 3, "--sigma", 0.1)
    assert len(work.certify("file-voted", *engine, *FEW, "--max", 5)) == 5


def test_classifier_without_a_unet_is_plain_smoothing(work: Workplace, file: str) -> None:
    """On the same noise it has the certificates of the same classifier that was an ONNX file, behind a UNet."""
    given = "--unet none --image-size 32 --classifier my_classifiers:cifar_10_model".split()
    work("export", *given, *LEVELS, "--images", "cifar", *QUICK, "--out", "alone")
    assert work.sidecar("alone/unet.onnx")["prediction"] == "none"
    settings = "--images cifar --batch 20 --sigma 0.02 --steps 0 --n0 10 --n 50".split()
    rows = work.certify("alone-plain", "--engine", "alone/unet.onnx", *settings)
    print(f"cifar_10_model without a UNet, sigma 0.02: {right(rows)} of 20 right")
    assert right(rows) >= 15
    same = work.certify("file-plain", "--engine", file, *settings)
    assert [(row["predict"], row["radius"]) for row in same] == [(row["predict"], row["radius"]) for row in rows]


def test_diffusers_folder_becomes_certificates_in_fp16(work: Workplace) -> None:
    network = small_unet(32, 3, (16, 32), groups=8)
    network.save_pretrained(work.folder / "pipeline" / "unet")
    scheduler: Any = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.save_pretrained(work.folder / "pipeline" / "scheduler")
    given = ["--unet", "pipeline", "--classifier", "my_classifiers:silabs_resnet", *LEVELS_128, "--images", "cifar"]
    work("export", *given, "--precision", "fp16", "--parity-images", 5, "--parity-samples", 10, "--out", "half")
    sidecar = work.sidecar("half/unet.fp16.onnx")
    assert (sidecar["precision"], sidecar["schedule"]["name"]) == ("fp16", "cosine")
    assert sidecar["accuracy"]["labels"] == 50
    print(f"fp16: {sidecar['accuracy']['labels_differ']} of 50 labels differ, {sidecar['accuracy']['relative_l2']:.1e}")
    engine = ("--engine", "half/unet.fp16.onnx", "--images", "cifar", "--batch", 20)
    rows = work.certify("half-voted", *engine, "--sigma", 0.1, "--steps", 2, "--votes", 3, *FEW, "--max", 5)
    assert len(rows) == 5
    plain = work.certify("half-plain", *engine, "--sigma", 0.01, "--steps", 0, "--n0", 10, "--n", 50)
    print(f"silabs_resnet in fp16, sigma 0.01: {right(plain)} of 20 right")
    assert right(plain) >= 15


# 256x256


def test_photographs_of_256x256_are_certified(work: Workplace) -> None:
    """Three levels, joined by pooling; the classifier crops to the 224x224 that it takes."""
    architecture = Architecture(3, 32, (32,) * 3, 1, (False,) * 3, "pool", True, True)
    work.save_unet("large.pt", architecture, Heads(number=1))
    given = "--unet large.pt --num-heads 1 --schedule linear --diffusion-steps 1000 --image-size 256 --crop 224".split()
    given += ["--classifier", "my_classifiers:efficientnet_lite0", "--classifier-weights", str(packaged.EFFICIENTNET)]
    work("export", *given, *LEVELS_127, "--images", "imagenet", "--out", "photographs")
    classifier = work.sidecar("photographs/classifier.onnx")
    assert (classifier["preprocessing"]["crop"], len(classifier["class_names"])) == ([224, 224], 1000)
    assert classifier["weights_sha256"] == sha256_of(packaged.EFFICIENTNET)
    engine = ("--engine", "photographs/unet.onnx", "--images", "imagenet", "--batch", 2)
    rows = work.certify("one", *engine, "--max", 1, "--sigma", 0.1, "--steps", 2, "--votes", 2, *FEW)
    assert len(rows) == 1
    plain = work.certify("both", *engine, "--sigma", 0.01, "--steps", 0, "--n0", 2, "--n", 10)
    print(f"efficientnet_lite0, sigma 0.01: {right(plain)} of 2 right")
    assert right(plain) == 2


# The published layouts in full


def saved(work: Workplace, known: Published) -> Path:
    path = work.save_unet(known.name, known.architecture, known.heads)
    content = torch.load(path, mmap=True, weights_only=True)
    assert sum(tensor.numel() for tensor in content.values()) == known.parameters
    return path


@pytest.mark.slow
def test_published_cifar10_layout_needs_no_flags(work: Workplace) -> None:
    path = saved(work, CIFAR)
    given = ["--unet", path, "--classifier", "my_classifiers:cifar_10_model", *LEVELS, "--images", "cifar"]
    work("export", *given, "--out", "published")
    sidecar = work.sidecar("published/unet.onnx")
    assert sidecar["schedule"] == {
        "name": "cosine",
        "steps": 4000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "timestep_scale": 0.25,
    }
    assert sidecar["accuracy"]["relative_l2"] <= 1e-5
    engine = ("--engine", "published/unet.onnx", "--images", "cifar", "--batch", 4)
    rows = work.certify("published-voted", *engine, "--max", 1, "--sigma", 0.25, "--steps", 2, "--votes", 3, *FEW)
    assert len(rows) == 1
    plain = work.certify("published-plain", *engine, "--sigma", 0.02, "--steps", 0, "--n0", 10, "--n", 50)
    assert right(plain) >= 15


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read as Linux tells it")
def test_published_imagenet_layout_fits_in_16_gib(work: Workplace) -> None:
    """552,814,086 parameters, 2.2 GB: the weights lie in a file beside the graph."""
    import resource

    path = saved(work, IMAGENET)
    given = ["--unet", path, "--crop", 224, "--classifier", "my_classifiers:efficientnet_lite0"]
    given += ["--classifier-weights", packaged.EFFICIENTNET, *LEVELS_127, "--images", "imagenet"]
    work.alone("export", *given, "--out", "large")
    peak = (
        resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    )  # KiB; of the largest child, or of what started it
    print(f"peak memory {peak:.1f} GiB")
    assert peak <= MEMORY_GIB

    folder = work.folder / "large"
    assert sorted(file.name for file in folder.iterdir()) == sorted([*ENGINES, "unet.onnx.data"])
    onnx.checker.check_model(str(folder / "unet.onnx"))
    sidecar = work.sidecar("large/unet.onnx")
    assert (sidecar["image"], sidecar["schedule"]["name"]) == ([3, 256, 256], "linear")
    assert sidecar["data"] == {"name": "unet.onnx.data", "sha256": sha256_of(folder / "unet.onnx.data")}
    assert sidecar["accuracy"]["relative_l2"] <= 1e-5
    path.unlink()
    run = "certify --dry-run --images imagenet --max 1 --batch 1 --threads 1 --sigma 0.5 --steps 1".split()
    done = work.alone(*run, "--engine", "large/unet.onnx")
    assert "large/unet.onnx" in done.stderr
