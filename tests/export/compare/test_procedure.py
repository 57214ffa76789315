from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from densepure_rt.errors import EnvironmentFault, UsageError
from densepure_rt.export.compare.engine_run import EngineRun, flat
from densepure_rt.export.compare.procedure import (
    OURS,
    SMALL,
    CallSeconds,
    Procedure,
    ProcedureBenchmark,
    PublishedProcedure,
    T,
    compare,
    factors_of,
    noisy,
    plurality,
    run_ours,
    run_published,
)
from densepure_rt.export.models.check_images import made_up
from densepure_rt.export.models.classifiers import ClassifierModel
from densepure_rt.export.models.sources import Models
from densepure_rt.export.models.unets import DiffusionModel, no_unet
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.runtime.bundle import Bundle
from densepure_rt.runtime.open_device import open_device
from densepure_rt.runtime.schedule import Schedule, make_chain
from densepure_rt.smoothing.settings import PAPER, Settings
from densepure_rt.smoothing.voting import Ballot
from tests.support.toys import IMAGE, toy_bundle, toy_classifier, toy_models, toy_unet

TINY = Settings(sigma=0.5, steps=2, votes=3, n0=2, n=5, method="fixed")


def asked(**changes: Any) -> Settings:
    """Ours at the toy's sigma."""
    return dataclasses.replace(OURS, **({"sigma": 0.5} | changes))


def pictures(count: int, label: int | None = None) -> list[LabelledImage]:
    return [LabelledImage(idx, pixels, label) for idx, pixels in enumerate(made_up(IMAGE, count))]


class Watched(nn.Module):
    """A network that notes what it is given, and takes `seconds` an image by a clock of its own."""

    now = 0.0

    def __init__(self, network: nn.Module, seconds: float = 0.0) -> None:
        super().__init__()
        self.network, self.seconds = network, seconds
        self.given: list[Tensor] = []

    def forward(self, x: Tensor, *told: Tensor) -> Tensor:
        self.given.append(x.clone())
        Watched.now += self.seconds * len(x)
        output: Tensor = self.network(x, *told)
        return output

    @classmethod
    def clock(cls) -> float:
        return cls.now


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("toy"))


def watched(unet_seconds: float = 0.0, label_seconds: float = 0.0) -> Models:
    unet, classifier = toy_models()
    return Models(
        dataclasses.replace(unet, network=Watched(unet.network, unet_seconds)),
        dataclasses.replace(classifier, network=Watched(classifier.network, label_seconds)),
    )


def given(model: DiffusionModel | ClassifierModel) -> list[Tensor]:
    return cast(Watched, model.network).given


# the published procedure


def test_every_sample_goes_through_k_whole_runs_of_b_steps() -> None:
    unet, classifier = watched()
    procedure = PublishedProcedure(Models(unet, classifier), TINY, 4, 0, Watched.clock)
    with torch.inference_mode():
        procedure.certify(pictures(1)[0])
    assert [len(x) for x in given(unet)] == [4, 4, 3, 3] * 3  # 7 samples in batches of 4, two steps each, three runs
    assert [len(x) for x in given(classifier)] == [4, 3] * 3
    assert procedure.meter.images == {"step": 7 * 3 * 2, "classify": 7 * 3}


def test_the_runs_have_the_smoothing_noise_in_common_and_nothing_else() -> None:
    unet, classifier = watched()
    procedure = PublishedProcedure(Models(unet, classifier), TINY, 7, 0, Watched.clock)
    image = pictures(1)[0]
    with torch.inference_mode():
        procedure.certify(image)
        procedure.certify(image)
    first, second = given(unet)[0::2], given(unet)[1::2]  # one run after another, each of two steps
    for x in first[1:3]:
        assert torch.equal(x, first[0])
    assert all(not torch.equal(second[0], x) for x in second[1:])
    assert not torch.equal(first[0], first[3])  # a second certification draws on
    assert torch.equal(first[3], first[5])


def test_the_seed_decides_the_smoothing_noise() -> None:
    firsts = []
    for seed in (0, 0, 1):
        unet, classifier = watched()
        with torch.inference_mode():
            PublishedProcedure(Models(unet, classifier), TINY, 7, seed, Watched.clock).certify(pictures(1)[0])
        firsts.append(given(unet)[0])
    assert torch.equal(firsts[0], firsts[1])
    assert not torch.equal(firsts[0], firsts[2])


def test_a_noisy_copy_is_the_image_with_noise_sigma_at_the_scale_of_the_chain() -> None:
    chain = make_chain(toy_unet().schedule, "fixed_small", 0.25, 2)
    clean = torch.full((1, 20, 20), 51, dtype=torch.uint8)  # 0.2 in [0, 1], -0.6 in [-1, 1]
    x = noisy(clean, chain, 500, torch.Generator().manual_seed(0)) / chain.scale
    assert x.shape == (500, 1, 20, 20)
    assert x.dtype == torch.float32
    assert float(x.mean()) == pytest.approx(-0.6, abs=5 * 0.5 / math.sqrt(x.numel()))
    assert float(x.std()) == pytest.approx(0.5, rel=0.01)


def test_a_tie_goes_to_the_label_that_was_seen_first() -> None:
    runs = [[0, 2, 5, 1], [1, 1, 5, 2], [1, 2, 4, 0], [0, 1, 4, 2]]
    assert plurality(runs).tolist() == [0, 2, 5, 2]


def test_the_plurality_is_what_the_ballot_finds() -> None:
    draw = random.Random(0)
    runs = [[draw.randrange(4) for _ in range(300)] for _ in range(6)]
    found = plurality(runs)
    for votes, winner in zip(zip(*runs, strict=True), found, strict=True):
        ballot = Ballot(6)
        for vote in votes:
            ballot.cast(vote)
        assert ballot.winner == winner
        assert Counter(votes)[winner] == max(Counter(votes).values())


def test_a_run_ends_at_what_a_network_that_is_told_sigma_denoises_to() -> None:
    """One that always finds the same picture: the chain must land on it, whatever was drawn on the way."""

    class Certain(nn.Module):
        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            assert sigma.shape == (len(x),)
            return torch.full_like(x, 0.25)

    unet = DiffusionModel(
        Certain(), IMAGE, Schedule("continuous", 1), "fixed_small", "denoiser", (-1.0, 1.0), weights_sha256="a" * 64
    )
    _, classifier = watched()
    with torch.inference_mode():
        PublishedProcedure(Models(unet, classifier), dataclasses.replace(TINY, steps=3), 7, 0, Watched.clock).certify(
            pictures(1)[0]
        )
    assert len(given(classifier)) == 3
    for purified in given(classifier):
        torch.testing.assert_close(purified, torch.full_like(purified, 0.25))


def test_the_first_n0_samples_select_and_the_others_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    procedure = PublishedProcedure(toy_models(), TINY, 7, 0, Watched.clock)
    monkeypatch.setattr(procedure, "run_labels", lambda pixels, noise, reverse: [2, 2, 1, 2, 1, 0, 2])
    found = procedure.certify(pictures(1)[0])
    assert (found.n0, found.n, found.n_a) == (2, 5, 2)  # of class 2


def test_pricing_at_the_small_size_gives_what_the_small_run_took() -> None:
    """By a clock on which nothing but calls takes time."""
    unet, classifier = watched(unet_seconds=0.5, label_seconds=0.125)
    with torch.inference_mode():
        taken, calls = run_published(Models(unet, classifier), pictures(3), TINY, 4, 0, Watched.clock)
    assert calls == CallSeconds(0.5, 0.125)
    assert calls.priced(TINY) == taken  # seconds too, and nothing is said of unlabelled images
    assert taken.seconds == 7 * 3 * (2 * 0.5 + 0.125)


def test_the_published_size_is_forty_million_calls() -> None:
    priced = CallSeconds(unet=1.0, classifier=0.5).priced(PAPER)
    assert (priced.samples, priced.unet_calls, priced.classifier_calls) == (100_100, 40_040_000, 4_004_000)
    assert priced.seconds == 100_100 * 40 * (10 * 1.0 + 0.5)
    assert priced.certified is None


def test_the_small_run_can_certify_the_radius_it_is_asked_about() -> None:
    """A classifier that always says 1 is certified by 56 of 56, and right where the label is 1."""

    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([0.0, 1.0, 0.0]).expand(len(x), 3)

    classifier = dataclasses.replace(toy_classifier(), network=One())
    images = [*pictures(3, label=1), *pictures(1, label=0)]
    with torch.inference_mode():
        taken, _ = run_published(Models(toy_unet(), classifier), images, SMALL, 32, 0)
        assert taken.certified == 0.75
        few = dataclasses.replace(SMALL, n=30)  # 0.001^(1/30) = 0.79, below Phi(1)
        assert run_published(Models(toy_unet(), classifier), images, few, 32, 0)[0].certified is None


# ours


def test_ours_is_counted_at_the_device_and_asks_without_labels(toy: Bundle) -> None:
    settings = Settings(sigma=0.05, steps=2, votes=3, n=100, method="sequential", radii=(0.05,))
    device = open_device(toy, 4, 2)
    try:
        unlabelled, *labelled = (run_ours(toy, device, pictures(3, label), settings, 0) for label in (None, 0, 1, 2))
    finally:
        device.close()
    assert unlabelled.procedure.certified is None
    shares = [run.procedure.certified for run in labelled]
    assert 0 < sum(share or 0.0 for share in shares) <= 1  # an image has one class at most, whatever its label says
    for run in (unlabelled, *labelled):
        ours = run.procedure
        assert run.samples_judged == unlabelled.samples_judged > 32
        assert ours.samples >= run.samples_judged
        assert ours.samples <= ours.unet_calls <= ours.samples * (1 + 3)
        assert ours.classifier_calls <= ours.samples * 3
        assert all(0 < share <= 1 for share in run.fill.values())
        assert 0 < run.main_thread < 1


# both


@pytest.mark.parametrize(("votes", "steps"), [(40, 10), (1, 1), (40, 1), (5, 2)])
def test_factors_multiply_to_the_ratios(votes: int, steps: int) -> None:
    draw = random.Random(votes)
    settings = Settings(sigma=0.25, steps=steps, votes=votes, n=10_000, method="sequential", radii=(0.25,))
    for _ in range(100):
        published = CallSeconds(draw.uniform(0, 1), draw.uniform(0, 1)).priced(
            dataclasses.replace(PAPER, votes=votes, steps=steps)
        )
        samples, calls, labels, seconds = (draw.uniform(1, 1000) for _ in range(4))
        ours = Procedure(settings, samples, calls, labels, seconds)
        found = factors_of(published, ours)
        of_calls = found.statistics * found.shared_step * found.ballots
        assert of_calls == pytest.approx(published.unet_calls / calls, rel=1e-12)
        assert of_calls * found.engine == pytest.approx(published.seconds / seconds, rel=1e-12)
        assert found.shared_step == votes * steps / (1 + votes * (steps - 1))


@pytest.fixture(scope="module")
def found(toy: Bundle) -> ProcedureBenchmark:
    said: list[str] = []
    watched: list[int] = []

    def watch(work: Iterable[T], total: int) -> Iterable[T]:
        watched.append(total)
        return work

    result = compare(
        toy_models(),
        EngineRun(toy, 4, 2),
        pictures(2, label=0),
        asked(steps=3, votes=4, n=64),
        small=TINY,
        say=said.append,
        watch=watch,
    )
    assert watched == [2, 2]
    assert said[1:] == [
        "the published procedure in PyTorch, small: n0 2, n 5, K 3, b 2",
        "ours on the engine: n 64 at most, K 4, b 3",
    ]
    return result


def test_both_are_compared_in_one_run(found: ProcedureBenchmark) -> None:
    assert (found.small.samples, found.small.unet_calls, found.small.classifier_calls) == (7, 42, 21)
    assert (found.published.samples, found.published.unet_calls) == (100_100, 100_100 * 4 * 3)
    assert found.unet_call_ratio == found.published.unet_calls / found.ours.unet_calls
    assert found.time_ratio == found.published.seconds / found.ours.seconds
    factors = found.factors
    assert factors.statistics * factors.shared_step * factors.ballots == pytest.approx(found.unet_call_ratio)
    assert found.unet_call_ratio * factors.engine == pytest.approx(found.time_ratio)
    assert 0 < found.predicted_seconds <= found.small.seconds
    assert found.small.certified is None  # five samples do not reach the radius
    assert found.ours.certified is not None
    assert (found.batch, found.threads, found.clock, found.machine.gpu) == (4, 2, "wall", None)
    assert found.small.settings.sigma == found.published.settings.sigma == found.ours.settings.sigma == 0.5
    assert found.ours.settings.radii == (0.5,)


def test_the_report_is_json(found: ProcedureBenchmark) -> None:
    report = json.loads(json.dumps(flat(found)))
    assert set(report["factors"]) == {"statistics", "shared_step", "ballots", "engine"}
    for procedure in ("small", "published", "ours"):
        assert {"settings", "samples", "unet_calls", "classifier_calls", "seconds", "certified"} == set(
            report[procedure]
        )
    assert set(report["fill"]) == {"smooth", "step", "classify"}


def test_one_thread_is_timed_in_seconds_of_its_core(toy: Bundle) -> None:
    settings = asked(steps=1, votes=2, n=64)
    result = compare(toy_models(), EngineRun(toy, 4, 1), pictures(1), settings, small=TINY)
    assert result.clock == "core"
    assert result.factors.ballots == pytest.approx(1)  # one step: one vote is all votes
    assert result.factors.shared_step == 2
    assert result.ours.certified is None


@pytest.mark.parametrize(
    ("settings", "run", "said"),
    [
        ({"steps": 0}, {}, "needs a diffusion network and `steps` 1 or more"),
        ({"steps": 5000}, {}, "steps do not fit"),
        ({"votes": 0}, {}, "`votes` is a count"),
        ({"n": 0}, {}, "at least 1"),
        ({"n": 20}, {}, r"`n` 20: .* the radius 0.5, .* ask for `n` \d+ at least"),
        ({"sigma": 0.0}, {}, "`sigma` is the standard deviation"),
        ({}, {"batch": 0}, "`batch` 0"),
        ({}, {"threads": 0}, "`threads` 0"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_refused(
    toy: Bundle, settings: dict[str, float], run: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        compare(toy_models(), EngineRun(toy, **run), pictures(1), asked(**settings))


def test_n_that_is_asked_for_instead_is_enough(toy: Bundle) -> None:
    with pytest.raises(UsageError) as refused:
        compare(toy_models(), EngineRun(toy), pictures(1), asked(n=20))
    least = int(str(refused.value).split("`n` ")[-1].split()[0])
    assert 40 < least < 64
    settings = asked(steps=2, votes=2, n=least)
    result = compare(toy_models(), EngineRun(toy, 4), pictures(1), settings, small=TINY)
    assert result.ours.samples > 0


def test_a_bundle_without_a_diffusion_network_is_refused(toy: Bundle) -> None:
    with pytest.raises(UsageError, match="`procedure` compares how often the UNet is called"):
        compare(Models(no_unet(IMAGE), toy_classifier()), EngineRun(toy), pictures(1), asked())


def test_an_engine_of_another_model_is_refused(toy: Bundle) -> None:
    other = dataclasses.replace(toy_unet(), weights_sha256="c" * 64)
    with pytest.raises(UsageError, match="was exported from weights"):
        compare(Models(other, toy_classifier()), EngineRun(toy), pictures(1), asked())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this PyTorch can use a GPU")
def test_an_engine_on_the_gpu_is_not_compared_with_pytorch_on_the_cpu(toy: Bundle) -> None:
    with pytest.raises(EnvironmentFault, match="cannot use one"):
        compare(toy_models(), EngineRun(toy, provider="cuda"), pictures(1), asked())


def test_torch_takes_no_read_only_pixels_by_reference() -> None:
    """Image sets give such arrays, and PyTorch warns of them."""
    image = pictures(1)[0]
    image.pixels.setflags(write=False)
    with torch.inference_mode():
        found = PublishedProcedure(toy_models(), TINY, 7, 0, Watched.clock).certify(image)
    assert found.n == TINY.n
