"""Make the pictures of README and docs (`make pictures`): one drawn from a real certificate, and two of real pages.

The pages are photographed in Chromium; where there is none, their pictures stay as they are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image

from densepure_rt.images.datasets import LabelledImage, open_images
from densepure_rt.images.formats import Pixels
from densepure_rt.keys import seeded_secret
from densepure_rt.rounding import exact, floored
from densepure_rt.smoothing.classifier import Certified, SmoothedClassifier, load
from densepure_rt.smoothing.replay import Replayed, replay
from densepure_rt.smoothing.settings import Settings
from tests.support.browser import CHROMIUM, Tab, browser
from tests.support.cli import in_a_process
from tests.support.server import serving

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "pictures"
IMAGE, SEED, SAMPLE = 200, 1, 2  # of the shipped images; of the run; of the samples that were counted
SETTINGS = Settings(sigma=0.5)
INK, QUIET, ACCENT = "#1f2933", "#52606d", "#1f6f5c"


def certified(classifier: SmoothedClassifier) -> tuple[Certified, Replayed]:
    """Certify the image, and draw one of the samples that were counted again."""
    images = open_images(None, classifier.bundle.unet.image, classifier.class_names)
    chosen = next(image for image in images if image.idx == IMAGE)
    (found,) = classifier.certify_each([chosen], SETTINGS)
    return found, replay(classifier, chosen, SETTINGS, SAMPLE)


def show(figure: Figure, place: tuple[float, float, float, float], pixels: Pixels) -> None:
    """Put a grey or colour image, uint8 [C, H, W], into a box of the figure (left, bottom, width, height)."""
    axes = figure.add_axes(place)
    shown: Any = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def arrow(figure: Figure, start: float, end: float, label: str) -> None:
    """Draw a labelled arrow from left to right at half the height."""
    ends = ((start, 0.5), (end, 0.5))
    figure.add_artist(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=14, color=QUIET, linewidth=1.2))
    figure.text((start + end) / 2, 0.53, label, ha="center", va="bottom", fontsize=9, color=QUIET)


def draw(image: LabelledImage, found: Certified, drawn: Replayed, names: tuple[str, ...]) -> Figure:
    """Lay out image, noisy image, purified votes and certificate from left to right."""
    figure = Figure(figsize=(10, 3.1), facecolor="white")
    title: Any = {"ha": "center", "fontsize": 10, "color": INK, "weight": "bold"}
    show(figure, (0.01, 0.3, 0.13, 0.42), image.pixels)
    figure.text(0.075, 0.78, "image", **title)
    arrow(figure, 0.147, 0.215, f"noise\nσ = {exact(SETTINGS.sigma)}")
    show(figure, (0.222, 0.3, 0.13, 0.42), drawn.noisy)
    figure.text(0.287, 0.78, "noisy", **title)
    arrow(figure, 0.359, 0.437, "denoise,\nclassify")
    figure.text(0.54, 0.93, f"{len(drawn.purified)} purified votes", **title)
    for i, (pixels, label) in enumerate(zip(drawn.purified, drawn.labels, strict=True)):
        bottom = 0.75 - 0.185 * i
        show(figure, (0.448, bottom, 0.052, 0.165), pixels)
        figure.text(0.51, bottom + 0.08, names[label], va="center", fontsize=10, color=INK)
    arrow(figure, 0.625, 0.715, f"repeat for\n{found.certificate.n} samples")
    certificate = found.certificate
    assert certificate.predict is not None
    assert certificate.radius is not None
    figure.text(0.855, 0.78, "certificate", **title)
    figure.text(0.855, 0.6, names[certificate.predict], ha="center", fontsize=17, color=ACCENT, weight="bold")
    lines = (
        f"{certificate.n_a} of {certificate.n} samples agree",
        f"no change of l2 norm below {floored(certificate.radius)}",
        "alters this answer",
        f"error probability at most {exact(certificate.alpha)}",
    )
    for i, line in enumerate(lines):
        figure.text(0.855, 0.5 - 0.085 * i, line, ha="center", fontsize=9.5, color=INK)
    return figure


def certificate_picture() -> None:
    """Draw what becomes of one image."""
    mpl.use("agg")
    with load(secret=seeded_secret(SEED)) as classifier:
        found, drawn = certified(classifier)
        names = classifier.class_names
    file = FOLDER / "certificate.png"
    draw(found.image, found, drawn, names).savefig(file, dpi=150, metadata={"Software": None})
    tell(file)


def photograph(tab: Tab, file: Path, height: int) -> None:
    """Save the upper part of the page, in few colours, which keeps the file small."""
    tab.screenshot(file)
    with Image.open(file) as page:
        upper = page.convert("RGB").crop((0, 0, page.width, min(height, page.height)))
    upper.quantize(128).save(file, optimize=True)
    tell(file)


def report_picture(tab: Tab, folder: Path) -> None:
    """Photograph the report of ten images with a gallery."""
    options = ("--sigma", 0.25, "--radii", "0,0.1,0.2,0.3", "--max", 10, "--seed", SEED)
    for command in (("certify", *options, "--out", "run"), ("report", "run", "--gallery", 3)):
        done = in_a_process(*command, cwd=folder)
        assert done.returncode == 0, done.stderr
    tab.open((folder / "report.html").as_uri())
    tab.wait_for("document.readyState == 'complete' && document.body.innerText")
    photograph(tab, FOLDER / "report.png", 970)


def demo_picture(tab: Tab) -> None:
    """Photograph the demo page after it has certified its first example."""
    with serving("--sigma", SETTINGS.sigma, "--seed", SEED, "--method", "radius", "--n", 1000) as server:
        tab.open(f"http://{server.host}:{server.port}/demo/")
        tab.wait_for("document.querySelectorAll('#examples button').length")
        tab.value("by('deadline').value = 120")
        tab.value("document.querySelector('#examples button').click()")
        tab.wait_for("by('meaning').textContent && document.querySelectorAll('#samples > li').length == SAMPLES")
        photograph(tab, FOLDER / "demo.png", 1400)


def tell(file: Path) -> None:
    print(f"wrote {file.relative_to(ROOT)}, {file.stat().st_size:,} bytes")


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    certificate_picture()
    if CHROMIUM is None:
        print("no chromium: the pictures of the report and the demo page stay as they are")
        return
    with tempfile.TemporaryDirectory() as name, browser(Path(name, "profile")) as tab:
        tab.looks(1100, 900)
        report_picture(tab, Path(name))
        demo_picture(tab)


if __name__ == "__main__":
    main()
