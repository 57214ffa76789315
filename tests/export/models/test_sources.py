"""What --unet and --classifier name, what is declared beside them, and the images that an export is checked on."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from densepure_rt.cli import main
from densepure_rt.errors import UsageError
from densepure_rt.export.convert import to_onnx
from densepure_rt.export.convert.to_onnx import step_onnx
from densepure_rt.export.models.check_images import (
    LABEL_IMAGES,
    LARGE_IMAGE,
    PARITY_IMAGES,
    calibration_pixels,
    check_images,
    comparison_images,
    made_up,
)
from densepure_rt.export.models.classifiers import ClassifierModel, zoo_classifier
from densepure_rt.export.models.model_options import ModelOptions
from densepure_rt.export.models.openai_unet import Architecture, Heads, OpenAIUNet
from densepure_rt.export.models.programs import load_callable
from densepure_rt.export.models.sources import (
    CLASSIFYING,
    LAYOUT,
    TRAINING,
    Models,
    clip_of,
    image_of,
    open_models,
    open_unet,
    scale_of,
    steps_of,
)
from densepure_rt.export.models.unets import DiffusersNetwork, NoNetwork, no_unet, zoo_unet
from densepure_rt.export.zoo.make_data import CLASS_NAMES
from densepure_rt.export.zoo.models import ZOO
from densepure_rt.images.datasets import SHIPPED_SHAPE, open_images
from densepure_rt.runtime.bundle import StepSidecar, read_sidecar, sha256_of, shipped_engine
from densepure_rt.runtime.device import STEP_INPUTS, STEP_OUTPUTS
from densepure_rt.runtime.onnx_device import open_session
from densepure_rt.runtime.schedule import Schedule, TimestepRule
from tests.support.diffusers_folder import small_unet

Done = CompletedProcess[str]
ARCHITECTURE = Architecture(3, 32, (32, 32), 1, (False, False), "conv", True, False)
AS_TRAINED = {"num_heads": 1, "schedule": "cosine", "diffusion_steps": 4000, "image_size": "32"}
DECLARED = {"image_size": "2x6x4", "schedule": "linear", "diffusion_steps": 1000, "prediction": "epsilon"}
NETWORKS = """
    import torch
    from torch import nn

    class Toy(nn.Module):
        channels = 2

        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(self.channels, self.channels, 1)

        def forward(self, x, t):
            return self.mix(x) * torch.cos(t)[:, None, None, None]

    def default():
        from densepure_rt.export.models.unets import zoo_unet
        return zoo_unet().network

    class Grey(Toy):
        channels = 1

    class Learned(Toy):
        def forward(self, x, t):
            return torch.cat([super().forward(x, t), x], 1)

    def zeros():
        network = Toy()
        nn.init.zeros_(network.mix.weight)
        return network

    def classifier():
        torch.manual_seed(1)
        return nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 4, 5))
"""


class Toy(nn.Module):
    """As the Toy of NETWORKS."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.mix = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        mixed: Tensor = self.mix(x) * torch.cos(t)[:, None, None, None]
        return mixed


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a module `networks` in it."""
    (tmp_path / "networks.py").write_text(textwrap.dedent(NETWORKS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    return tmp_path


def options(**given: Any) -> ModelOptions:
    return ModelOptions(**given)


def declared(**given: Any) -> ModelOptions:
    return options(**DECLARED | given)


def refusal(call: Callable[[], object], *words: str) -> str:
    """The one line of a UsageError that holds `words`."""
    with pytest.raises(UsageError) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def checkpoint(folder: Path, content: Any = None, name: str = "unet.pt") -> Path:
    torch.save(state() if content is None else content, folder / name)
    return folder / name


def state(**changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(OpenAIUNet(dataclasses.replace(ARCHITECTURE, **changes), Heads(number=1)).state_dict())


def program(folder: Path, network: nn.Module, *example: Tensor) -> Path:
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside torch.export
        exported = torch.export.export(network.eval(), example, dynamic_shapes=tuple({0: batch} for _ in example))
        torch.export.save(exported, folder / "network.pt2")
    return folder / "network.pt2"


def diffusers_folder(folder: Path, sample_size: int | None = 8, **training: Any) -> Path:
    network = small_unet(sample_size, 3, (8, 16))
    network.save_pretrained(folder / "unet")
    scheduler: Any = DDPMScheduler(**training)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


# --unet


def test_without_a_word_it_is_the_model_that_ships() -> None:
    unet, classifier = open_models(options())
    assert (unet.image, classifier.image) == (SHIPPED_SHAPE, SHIPPED_SHAPE)
    assert unet.weights_sha256 == zoo_unet().weights_sha256
    assert classifier.class_names == CLASS_NAMES


def test_weights_are_a_folder_of_the_shipped_models_files(tmp_path: Path) -> None:
    for name in ("unet", "classifier"):
        (tmp_path / f"{name}.safetensors").write_bytes((ZOO / f"{name}.safetensors").read_bytes())
    unet, classifier = open_models(options(weights=tmp_path))
    assert (unet.weights_sha256, classifier.weights_sha256) == (
        sha256_of(tmp_path / "unet.safetensors"),
        sha256_of(tmp_path / "classifier.safetensors"),
    )
    refusal(lambda: open_models(options(weights=tmp_path / "none")), "unet.safetensors", "`weights`")
    refusal(lambda: open_models(options(weights=Path("x" * 300))), "`weights`")


@pytest.mark.parametrize("name", ["unet", "classifier"])
def test_weights_go_with_the_shipped_model_alone(name: str) -> None:
    refusal(lambda: open_models(options(weights=Path(), **{name: "none"})), "`weights`", "`unet`", "`classifier`")


def test_checkpoint_is_read_as_openais_layout(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    model = open_unet(options(unet=str(path), **AS_TRAINED))
    assert isinstance(model.network, OpenAIUNet)
    assert (model.image, model.schedule) == ((3, 32, 32), Schedule("cosine", 4000, timestep_scale=0.25))
    assert (model.prediction, model.variance, model.clip) == ("epsilon", "fixed_large", (-1.0, 1.0))
    assert (model.weights_sha256, model.timestep_rule) == (sha256_of(path), "nearest")


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".ckpt", ".safetensors"])
def test_every_suffix_of_a_checkpoint_is_one(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"none{suffix}"
    refusal(lambda: open_unet(options(unet=str(path))), f"no checkpoint at {path}")


def test_checkpoint_takes_prefix_scale_size_and_clip(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {f"ema.{name}": tensor for name, tensor in state().items()})
    given = AS_TRAINED | {"timestep_scale": 0.5, "unet_prefix": "ema.", "image_size": "3x16x16", "clip": "none"}
    model = open_unet(options(unet=str(path), **given))
    assert (model.image, model.clip, model.schedule.timestep_scale) == ((3, 16, 16), None, 0.5)


def test_all_that_a_checkpoint_leaves_open_is_named_at_once(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    refusal(
        lambda: open_unet(options(unet=str(path))), "`num_heads`", "`schedule`", "`diffusion_steps`", "`image_size`"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"diffusion_steps": None}, ["`schedule`", "`diffusion_steps`", "give both"]),
        ({"schedule": None}, ["`schedule`", "`diffusion_steps`", "give both"]),
        ({"schedule": None, "diffusion_steps": None, "timestep_scale": 1.0}, ["`timestep_scale`", "give all three"]),
        ({"timestep_scale": 0.0}, ["`timestep_scale` 0", "above 0"]),
        ({"timestep_scale": math.nan}, ["`timestep_scale` nan"]),
        ({"schedule": "scaled_linear"}, ["`schedule` scaled_linear", "linear or cosine"]),
        ({"image_size": "32x16"}, ["`image_size` 32x16", "squares"]),
        ({"image_size": "1x32x32"}, ["`image_size` 1x32x32", "3 channels", "32 alone"]),
        ({"image_size": "33"}, ["`image_size` 33x33", "multiples of 2"]),
        ({"num_head_channels": 8}, ["`num_heads`", "`num_head_channels`", "one of the two"]),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_checkpoint_is_refused(tmp_path: Path, given: dict[str, Any], words: list[str]) -> None:
    path = checkpoint(tmp_path)
    refusal(lambda: open_unet(options(unet=str(path), **AS_TRAINED | given)), *words)


@pytest.mark.parametrize("size", [None, "16x24", "3x16x24"])
def test_folder_is_read_as_diffusers(tmp_path: Path, size: str | None) -> None:
    folder = diffusers_folder(tmp_path, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    model = open_unet(options(unet=str(folder), image_size=size))
    assert isinstance(model.network, DiffusersNetwork)
    assert model.image == ((3, 16, 24) if size else (3, 8, 8))
    assert (model.schedule, model.prediction) == (Schedule("cosine", 1000), "v")


def test_folder_that_does_not_say_its_clip_needs_it(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path)
    config = folder / "scheduler" / "scheduler_config.json"
    known = json.loads(config.read_text())
    del known["clip_sample"]
    config.write_text(json.dumps(known))
    refusal(lambda: open_unet(options(unet=str(folder))), "clip_sample", "`clip`=-1,1", "`clip` none")
    for said, clip in (("none", None), ("-1,1", (-1.0, 1.0))):
        assert open_unet(options(unet=str(folder), clip=said)).clip == clip


def test_folder_that_does_not_say_its_size_needs_it(tmp_path: Path) -> None:
    folder = diffusers_folder(tmp_path, sample_size=None)
    refusal(lambda: open_unet(options(unet=str(folder))), "`image_size`")
    assert open_unet(options(unet=str(folder), image_size="8")).image == (3, 8, 8)
    refusal(lambda: open_unet(options(unet=str(folder), image_size="1x8x8")), "in_channels is 3", "3x8x8")
    refusal(lambda: open_unet(options(unet=str(folder), image_size="7")), "`image_size` 7x7", "multiples of 2")


def test_program_is_read_as_what_was_declared(tmp_path: Path) -> None:
    network, x, t = Toy(), torch.randn(2, 2, 6, 4), torch.tensor([0.5, 3.0])
    path = program(tmp_path, network, x, t)
    model = open_unet(declared(unet=str(path), prediction="v", timestep_scale=0.25, clip="-2,3"))
    assert torch.equal(model.network(x[[0, 1, 0]], t[[0, 1, 1]]), network(x[[0, 1, 0]], t[[0, 1, 1]]))
    assert (model.image, model.schedule) == ((2, 6, 4), Schedule("linear", 1000, timestep_scale=0.25))
    assert (model.prediction, model.variance, model.clip) == ("v", "fixed_small", (-2.0, 3.0))
    assert model.weights_sha256 == sha256_of(path)


def test_program_becomes_a_step_graph_like_the_module_that_it_was(tmp_path: Path) -> None:
    network, x, t = Toy(), torch.randn(2, 2, 6, 4), torch.tensor([0.5, 3.0])
    model = open_unet(declared(unet=str(program(tmp_path, network, x, t)), clip="none"))
    session = open_session(step_onnx(model), "unet.onnx", STEP_INPUTS, STEP_OUTPUTS)
    draw = np.random.default_rng(0)
    feed = {name: draw.standard_normal((5, 2, 6, 4)).astype(np.float32) for name in ("mean", "std", "noise")}
    feed["t"] = draw.uniform(0, 9, 5).astype(np.float32)
    feed["coef"] = np.tile(np.array([0.6, 0.8, 1, 0, 0, 0], np.float32), (5, 1))
    noisy = torch.from_numpy(feed["mean"] + feed["std"] * feed["noise"])
    with torch.no_grad():
        x0 = (noisy - 0.6 * network(noisy, torch.from_numpy(feed["t"]))) / 0.8
    np.testing.assert_allclose(session.run(["mean_next"], feed)[0], x0.numpy(), rtol=1e-4, atol=1e-5)


def test_callable_is_called_in_the_working_directory(here: Path) -> None:
    model = open_unet(declared(unet="networks:zeros", schedule="cosine", diffusion_steps=50, variance="fixed_large"))
    assert type(model.network).__name__ == "Toy"
    assert float(model.network.get_parameter("mix.weight").detach().abs().sum()) == 0
    assert (model.schedule, model.variance) == (Schedule("cosine", 50), "fixed_large")
    assert len(model.weights_sha256) == 64
    assert open_unet(declared(unet="networks:Learned", variance="learned")).learned_variance


@pytest.mark.parametrize("prefix", ["", "ema."])
def test_callable_takes_weights_from_a_file(here: Path, prefix: str) -> None:
    weights = {f"{prefix}{name}": tensor for name, tensor in Toy().state_dict().items()}
    path = checkpoint(here, weights, "weights.pt")
    model = open_unet(declared(unet="networks:Toy", unet_weights=path, unet_prefix=prefix))
    assert torch.equal(model.network.get_parameter("mix.weight"), weights[f"{prefix}mix.weight"])
    assert model.weights_sha256 == sha256_of(path)


def test_denoiser_is_told_sigma(here: Path) -> None:
    model = open_unet(
        options(unet="networks:Toy", image_size="2x6x4", schedule="continuous", prediction="denoiser", clip="none")
    )
    assert (model.schedule.continuous, model.prediction, model.clip) == (True, "denoiser", None)


@pytest.mark.parametrize(
    ("schedule", "prediction"), [("continuous", name) for name in ("epsilon", "v", "x0")] + [("linear", "denoiser")]
)
def test_continuous_schedules_and_denoisers_go_together(here: Path, schedule: str, prediction: str) -> None:
    given = {"unet": "networks:Toy", "schedule": schedule, "prediction": prediction}
    refusal(lambda: open_unet(declared(**given)), "`schedule` continuous", "`prediction` denoiser")


@pytest.mark.parametrize(
    ("given", "option"), [({"diffusion_steps": 40}, "`diffusion_steps`"), ({"timestep_scale": 2.0}, "`timestep_scale`")]
)
def test_continuous_schedule_has_no_timesteps(here: Path, given: dict[str, Any], option: str) -> None:
    continuous = {"schedule": "continuous", "prediction": "denoiser", "diffusion_steps": None}
    refusal(lambda: open_unet(declared(unet="networks:Toy", **continuous | given)), "no timesteps", f"leave {option}")


@pytest.mark.parametrize("kind", ["program", "callable"])
@pytest.mark.parametrize("lacking", [["image_size"], ["prediction", "schedule"], ["diffusion_steps"], list(DECLARED)])
def test_all_declarations_that_are_missing_are_named_at_once(here: Path, kind: str, lacking: list[str]) -> None:
    """Before anything is loaded: neither exists."""
    spec = "none.pt2" if kind == "program" else "nothing:here"
    given = DECLARED | dict.fromkeys(lacking)
    message = refusal(lambda: open_unet(options(unet=spec, **given)), spec, "does not say how it was trained")
    for name in DECLARED:
        assert (f"`{name}`" in message) == (name in lacking)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prediction": "noise"}, ["`prediction` noise", "epsilon, v, x0, denoiser"]),
        ({"prediction": "none"}, ["`prediction` none is not known"]),
        ({"variance": "large"}, ["`variance` large", "fixed_small", "renoised"]),
        ({"schedule": "sqrt"}, ["`schedule` sqrt", "linear, scaled_linear, cosine, continuous"]),
        ({"diffusion_steps": 1}, ["`diffusion_steps` 1"]),
        ({"diffusion_steps": 0}, ["`diffusion_steps` 0"]),
        ({"timestep_scale": -1.0}, ["`timestep_scale` -1"]),
        ({"timestep_scale": math.inf}, ["`timestep_scale` inf"]),
        ({"image_size": "3x6x4"}, ["`image_size`", "does not take x [2, 3, 6, 4]"]),
        ({"image_size": "0"}, ["`image_size` 0"]),
        ({"variance": "learned"}, ["`variance` learned", "[2, 4, 6, 4]", "[2, 2, 6, 4]"]),
        ({"clip": "1,-1"}, ["`clip` 1,-1", "smaller"]),
        ({"unet_prefix": "ema."}, ["`unet_prefix`", "`unet_weights`"]),
        ({"num_heads": 4}, ["leave `num_heads` out"]),
        ({"timestep_rule": "official"}, ["`timestep_rule` official", "nearest, densepure, carlini"]),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_callable_is_refused(here: Path, given: dict[str, Any], words: list[str]) -> None:
    refusal(lambda: open_unet(declared(unet="networks:Toy", **given)), *words)


def test_none_passes_pixels_on() -> None:
    model = open_unet(options(unet="none", image_size="3x6x4"))
    x = torch.randn(2, 3, 6, 4)
    assert isinstance(model.network, NoNetwork)
    assert torch.equal(model.network(x, torch.zeros(2)), x)
    assert (model.image, model.prediction, model.clip) == ((3, 6, 4), "none", None)
    assert model == dataclasses.replace(no_unet((3, 6, 4)), network=model.network)
    assert open_unet(options(unet="none", image_size="8")).image == (3, 8, 8)
    refusal(lambda: open_unet(options(unet="none")), "`unet` none", "`image_size`")


VALUES: dict[str, Any] = {
    "schedule": "linear",
    "diffusion_steps": 1000,
    "timestep_scale": 1.0,
    "prediction": "epsilon",
    "variance": "fixed_small",
    "num_heads": 4,
    "num_head_channels": 64,
    "unet_prefix": "model.",
    "unet_weights": Path("weights.pt"),
    "image_size": "32",
    "clip": "-1,1",
    "classifier_weights": Path("weights.pt"),
    "classifier_prefix": "model.",
    "labels": Path("labels.txt"),
    "pixel_range": "0,1",
    "mean": "0.5",
    "std": "0.5",
    "channel_order": "BGR",
    "resize": "224",
    "interpolation": "bilinear",
    "antialias": True,
    "beta_start": 0.001,
    "beta_end": 0.02,
    "crop": "224",
    "attention_order": "new",
}
MEANINGLESS = {
    "zoo": (*TRAINING, *LAYOUT, "image_size", "unet_weights"),
    "none": (*TRAINING, *LAYOUT, "unet_weights", "clip"),
    "diffusers": (*TRAINING, *LAYOUT, "unet_weights"),
    "checkpoint": ("prediction", "variance", "unet_weights"),
    "program": (*LAYOUT, "unet_weights"),
    "callable": ("num_heads", "num_head_channels", "attention_order"),
}
SPECS = {
    "zoo": None,
    "none": "none",
    "diffusers": ".",
    "checkpoint": "unet.pt",
    "program": "unet.pt2",
    "callable": "some.module:function",
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in MEANINGLESS.items() for name in names])
def test_option_that_means_nothing_for_a_kind_of_unet_is_refused_by_name(tmp_path: Path, kind: str, name: str) -> None:
    """Before anything is looked for."""
    given = options(unet=str(tmp_path) if kind == "diffusers" else SPECS[kind], **{name: VALUES[name]})
    assert given.given()[name] == f"`{name}`"
    refusal(lambda: open_unet(given), f"leave `{name}` out")


@pytest.mark.parametrize("name", CLASSIFYING)
def test_option_of_a_classifier_means_nothing_for_the_one_that_ships(name: str) -> None:
    refusal(lambda: open_models(options(**{name: VALUES[name]})), f"leave `{name}` out")


def test_all_that_is_to_be_left_out_is_named_at_once() -> None:
    given = options(unet="none", image_size="8", schedule="linear", num_heads=4, clip="none")
    refusal(lambda: open_unet(given), "leave `num_heads`, `schedule`, `clip` out")


@pytest.mark.parametrize("spec", ["resnet", "unet.txt", "a:b:c", "my-module:f", "a b:c", "x" * 300, "", "nul\0:x"])
def test_unet_that_is_of_no_kind_is_told_the_kinds(tmp_path: Path, spec: str) -> None:
    message = refusal(lambda: open_unet(options(unet=spec)), "`unet`", ".safetensors")
    assert all(kind in message for kind in ("diffusers folder", ".pt2", "package.module:function", "none"))


@pytest.mark.parametrize("rule", get_args(TimestepRule))
def test_timestep_rule_is_kept(rule: TimestepRule) -> None:
    assert open_unet(options(timestep_rule=rule)).timestep_rule == rule


def test_timestep_rules_are_for_timesteps() -> None:
    given = options(unet="none", image_size="8", timestep_rule="carlini")
    refusal(lambda: open_unet(given), "`timestep_rule` carlini", "leave it out")


# --classifier


def test_classifier_that_ships_takes_its_own_size_alone() -> None:
    given = options(unet="none", image_size="3x32x32")
    refusal(lambda: open_models(given), "[3, 32, 32]", "[1, 28, 28]", "`classifier`")
    assert open_models(options(unet="none", image_size="1x28x28"))[1].class_names == CLASS_NAMES


@pytest.mark.parametrize("kind", ["program", "callable"])
def test_classifier_is_declared_by_the_options(here: Path, kind: str) -> None:
    new = load_callable("networks:classifier")
    spec = "networks:classifier" if kind == "callable" else str(program(here, new(), torch.zeros(2, 2 * 6 * 4)))
    given = {"unet": "none", "image_size": "1x6x8", "pixel_range": "0,255", "mean": "100", "std": "50"}
    if kind == "program":  # of flat pixels
        refusal(lambda: open_models(options(classifier=spec, **given)), "does not take", "[2, 1, 6, 8]")
        spec = str(program(here, new(), torch.zeros(2, 1, 6, 8)))
    (here / "labels.txt").write_text("a\nb\nc\nd\ne\n")
    unet, classifier = open_models(options(classifier=spec, labels=here / "labels.txt", **given))
    assert (unet.image, classifier.image, classifier.class_names) == ((1, 6, 8), (1, 6, 8), tuple("abcde"))
    assert classifier.preprocessing is not None
    assert (classifier.preprocessing.scale, classifier.preprocessing.mean) == ((0.0, 255.0), (100.0,))
    x = torch.rand(3, 1, 6, 8) * 2 - 1
    expected = new()(((x + 1) * 127.5 - 100) / 50)
    assert torch.allclose(classifier.network(x), expected, atol=1e-5)


def test_classifier_reaches_every_preprocessing_option(here: Path) -> None:
    given = {"unet": "none", "image_size": "3x10x12", "classifier": "networks:classifier", "pixel_range": "0,1"}
    asked = {"mean": "0.1", "std": "0.2", "channel_order": "grey", "resize": "9x10", "crop": "6x8"}
    model = open_models(options(**given, **asked, interpolation="bilinear", antialias=False))[1]
    assert model.preprocessing is not None
    assert dataclasses.asdict(model.preprocessing) == {
        "scale": (0.0, 1.0),
        "mean": (0.1,),
        "std": (0.2,),
        "channels": "grey",
        "resize": (9, 10),
        "interpolation": "bilinear",
        "antialias": False,
        "crop": (6, 8),
    }


# Texts of options

sides = st.integers(1, 99_999)


@given(sides, sides, sides)
def test_image_size_is_a_square_a_height_and_width_or_all_three(channels: int, height: int, width: int) -> None:
    assert image_of(f"{height}") == (None, height, height)
    assert image_of(f"{height}x{width}") == (None, height, width)
    assert image_of(f"{channels}x{height}x{width}") == (channels, height, width)


@given(st.text() | st.from_regex(r"[-+\d x.,]{1,12}"))
def test_image_size_is_three_sizes_or_refused(text: str) -> None:
    with suppress(UsageError):
        channels, height, width = image_of(text)
        assert channels is None or channels >= 1
        assert min(height, width) >= 1
        assert text in (f"{height}", f"{height}x{width}", f"{channels}x{height}x{width}") or not text.isascii()


@pytest.mark.parametrize("text", ["", "0", "032", "-1", "32x", "x32", "3x32x32x1", "32X32", "3.5", "32 x 32", "1" * 6])
def test_image_size_of_another_form_is_refused(text: str) -> None:
    refusal(lambda: image_of(text), "`image_size`", "3x32x48")


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(numbers, numbers)
def test_clip_is_two_numbers_in_order(one: float, other: float) -> None:
    if one == other:
        refusal(lambda: clip_of(f"{one},{other}"), "`clip`")
    else:
        low, high = sorted((one, other))
        assert clip_of(f"{low!r},{high!r}") == (low, high)
        refusal(lambda: clip_of(f"{high!r},{low!r}"), "`clip`", "smaller")


@given(st.text() | st.from_regex(r"[-+\deE.,naif ]{1,12}"))
def test_clip_is_a_finite_range_or_refused(text: str) -> None:
    with suppress(UsageError):
        clip = clip_of(text)
        assert text == "none" or (clip is not None and -math.inf < clip[0] < clip[1] < math.inf)


@pytest.mark.parametrize("text", ["", "1", "1,1", "1,2,3", "None", "-1;1", "nan,1", "0,nan", "-inf,inf", "0,1e999"])
def test_clip_of_another_form_is_refused(text: str) -> None:
    refusal(lambda: clip_of(text), "`clip`", "none")


def test_clip_is_that_of_published_samplers_unless_told() -> None:
    assert clip_of(None) == (-1.0, 1.0)
    assert clip_of("none") is None


@given(st.integers())
def test_diffusion_steps_are_what_networks_are_trained_with(steps: int) -> None:
    if 2 <= steps <= 100_000:
        assert steps_of(steps) == steps
    else:
        refusal(lambda: steps_of(steps), f"`diffusion_steps` {steps}")


@given(st.floats())
def test_timestep_scale_is_positive_and_finite(scale: float) -> None:
    """Else the sidecar would be written, and refused by every run."""
    if 0 < scale < math.inf:
        assert scale_of(scale) == scale
    else:
        refusal(lambda: scale_of(scale), "`timestep_scale`")


# Images that an export is checked on


@pytest.fixture(scope="module")
def shipped() -> Models:
    return Models(no_unet(SHIPPED_SHAPE), zoo_classifier())


@pytest.fixture(scope="module")
def own() -> Models:
    names = tuple("abcde")
    return Models(no_unet((2, 6, 4)), ClassifierModel(nn.Linear(48, 5), (2, 6, 4), names, "a" * 64))


def images_file(folder: Path, count: int) -> Path:
    """Images whose first value is their place."""
    x = np.random.default_rng(0).integers(0, 256, (count, 6, 4, 2), dtype=np.uint8)
    x[:, 0, 0, 0] = np.arange(count)
    np.savez(folder / f"{count}.npz", x=x, y=np.arange(count) % 5)
    return folder / f"{count}.npz"


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 6), st.integers(0, 3))
def test_made_up_pictures_follow_from_their_place_alone(c: int, h: int, w: int, count: int, more: int) -> None:
    pictures = made_up((c, h, w), count)
    assert pictures.shape == (count, c, h, w)
    assert pictures.dtype == np.uint8
    assert np.array_equal(made_up((c, h, w), count + more)[:count], pictures)


def test_made_up_pictures_differ_and_are_smooth() -> None:
    pictures = made_up((3, 64, 64), 8).astype(int)
    assert pictures.std((2, 3)).min() > 5
    assert len(np.unique(pictures.reshape(8, -1), axis=0)) == 8
    assert max(np.abs(np.diff(pictures, axis=axis)).max() for axis in (2, 3)) < 60


def test_pictures_are_made_up_where_none_fit_and_it_is_said(own: Models) -> None:
    said: list[str] = []
    found = comparison_images(own, None, None, said.append)
    assert (len(found), [image.label for image in found]) == (LABEL_IMAGES, [None] * LABEL_IMAGES)
    assert np.array_equal(np.stack([image.pixels for image in found]), made_up((2, 6, 4), LABEL_IMAGES))
    assert len(said) == 1
    assert "made up" in said[0]
    assert len(comparison_images(own, None, 3)) == 3


def test_shipped_images_are_compared_on_where_they_are_the_models(shipped: Models) -> None:
    said: list[str] = []
    found = comparison_images(shipped, None, None, said.append)
    everything = list(open_images(None, SHIPPED_SHAPE, CLASS_NAMES))
    assert [image.idx for image in found] == [image.idx for image in everything[:: len(everything) // LABEL_IMAGES]]
    assert all(image.label is not None for image in found)
    assert said == []
    other = dataclasses.replace(shipped[1], class_names=tuple("0123456789"))
    assert all(image.label is None for image in comparison_images(Models(shipped[0], other), None, 2))


@given(st.data())
def test_comparison_images_are_evenly_spread(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """No two neighbours lie further apart than others by more than one, and the last part is not left out."""
    folder = tmp_path_factory.mktemp("images")
    own = Models(no_unet((2, 6, 4)), ClassifierModel(nn.Linear(48, 5), (2, 6, 4), tuple("abcde"), "a" * 64))
    total = data.draw(st.integers(1, 60))
    count = data.draw(st.integers(1, total))
    found = comparison_images(own, images_file(folder, total), count)
    places = [int(image.pixels[0, 0, 0]) for image in found]
    assert [image.label for image in found] == [place % 5 for place in places]
    assert len(set(places)) == count
    gaps = np.diff([*places, total])
    assert places[0] == 0
    assert gaps.min() >= 1
    assert np.ptp(gaps) <= 1


def test_as_many_images_are_taken_as_there_are(own: Models, tmp_path: Path) -> None:
    assert len(comparison_images(own, images_file(tmp_path, 7), None)) == 7
    assert len(comparison_images(own, images_file(tmp_path, 30), None)) == LABEL_IMAGES
    refusal(lambda: comparison_images(own, images_file(tmp_path, 7), 8), "8 images", "7.npz", "holds 7")
    refusal(lambda: comparison_images(own, None, 0), "0 images")


def test_calibration_is_on_training_images_of_the_model_or_none(shipped: Models, own: Models, tmp_path: Path) -> None:
    pixels = calibration_pixels(shipped, None)
    assert pixels is not None
    assert pixels.shape[1:] == SHIPPED_SHAPE
    assert pixels.dtype == np.uint8
    tested = {image.pixels.tobytes() for image in open_images(None, SHIPPED_SHAPE, CLASS_NAMES)}
    assert not tested & {image.tobytes() for image in pixels}
    again = calibration_pixels(shipped, None)
    assert again is not None
    assert np.array_equal(again, pixels)
    assert calibration_pixels(own, None) is None
    given = calibration_pixels(own, images_file(tmp_path, 9))
    assert given is not None
    assert (given.shape, given[:, 0, 0, 0].tolist()) == ((9, 2, 6, 4), list(range(9)))


def test_labels_are_compared_on_small_images_alone(own: Models) -> None:
    checks = check_images(own, None, None, None, 5)
    assert (checks.parity.shape, len(checks.labelled), checks.samples) == ((PARITY_IMAGES, 2, 6, 4), LABEL_IMAGES, 5)
    assert checks.calibration is None
    side = math.isqrt(LARGE_IMAGE) + 1
    large = Models(no_unet((1, side, side)), dataclasses.replace(own.classifier, image=(1, side, side)))
    checks = check_images(large, None, None, 2, 5)
    assert (checks.parity.shape, len(checks.labelled)) == ((2, 1, side, side), 0)
    refusal(lambda: check_images(own, None, None, None, 1), "`label_samples` 1")


# Through the command line


def command(*arguments: object) -> Done:
    """`densepure-rt ARGUMENTS` in this process; anything but an exit fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["densepure-rt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return Done(sys.argv, int(ended.value.code or 0), out.getvalue(), err.getvalue())


def refused(folder: Path, code: int, words: list[str], *arguments: object) -> None:
    """`export ARGUMENTS` ends in one error line that holds `words`, with this exit code, and writes nothing."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}
    done = command("export", *arguments, "--out", folder / "engines")
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1, done.stderr
    assert lines[-1].startswith("error: ")
    for word in words:
        assert word in lines[-1]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if "__pycache__" not in p.parts} == before


FLAGS = "--num-heads 1 --schedule cosine --diffusion-steps 4000 --image-size 32".split()
PLAIN = "--unet none --image-size 1x6x8 --classifier networks:classifier --pixel-range 0,1".split()


def optimizer() -> Any:
    network = nn.Linear(2, 2)
    steps = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    steps.step()
    return steps.state_dict()


BAD_CHECKPOINTS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "optimizer": (optimizer, ["param_groups", "model or ema file"]),
    "prefix": (lambda: {f"model.{n}": t for n, t in state().items()}, ["time_embed.0.weight", "--unet-prefix model."]),
    "nested": (lambda: {"step": 7, "ema": state()}, ["'ema.'", "--unet-prefix ema."]),
    "missing": (
        lambda: {n: t for n, t in state().items() if n != "middle_block.0.in_layers.2.bias"},
        ["has no middle_block.0.in_layers.2.bias"],
    ),
    "extra": (
        lambda: state() | {"input_blocks.1.0.h_upd.bias": torch.zeros(3)},
        ["input_blocks.1.0.h_upd.bias", "weights of this architecture"],
    ),
    "classes": (
        lambda: state() | {"label_emb.weight": torch.zeros(10, 128)},
        ["label_emb.weight", "unconditional", "256x256_diffusion_uncond.pt"],
    ),
    "model": (lambda: nn.Linear(2, 2), ["more than tensors", "state_dict()"]),
    "nothing": (dict, ["holds nothing"]),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_checkpoint_that_will_not_do_is_one_error(tmp_path: Path, name: str) -> None:
    content, words = BAD_CHECKPOINTS[name]
    path = checkpoint(tmp_path, content())
    refused(tmp_path, 2, ["unet.pt", *words], "--unet", path, *FLAGS)


def test_malicious_pickle_is_one_error_and_does_not_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, state() | {"out.2.bias": Bomb(tmp_path / "ran")})
    refused(tmp_path, 2, [str(path), "code from a file is not run", "state_dict()"], "--unet", path, *FLAGS)
    assert not (tmp_path / "ran").exists()


def test_damaged_checkpoint_is_one_error(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    refused(tmp_path, 1, [str(path), "damaged", "again"], "--unet", path, *FLAGS)


def test_weights_of_nan_are_one_error(here: Path) -> None:
    path = checkpoint(here, state() | {"out.2.bias": torch.full((3,), math.nan)})
    (here / "flat.py").write_text("from torch.nn import Flatten")
    given = ["--unet", path, *FLAGS, "--classifier", "flat:Flatten", "--pixel-range", "0,1"]
    refused(here, 1, ["UNet's weights hold NaN", "out.2.bias"], *given)


def test_size_that_the_unet_cannot_halve_is_one_error(tmp_path: Path) -> None:
    refused(tmp_path, 2, ["--image-size 31x31", "multiples of 2"], "--unet", checkpoint(tmp_path), *FLAGS[:-1], 31)


def test_prediction_that_is_not_declared_is_one_error(here: Path) -> None:
    given = "--unet networks:Toy --image-size 2x6x4 --schedule linear --diffusion-steps 1000".split()
    refused(here, 2, ["networks:Toy", "give --prediction"], *given)


def test_other_number_of_classes_than_labels_is_one_error(here: Path) -> None:
    labels = here / "labels.txt"
    labels.write_text("cat\ndog\n")
    refused(here, 2, [str(labels), "2 classes", "classifier has 5"], *PLAIN, "--labels", labels)


def test_precision_that_cannot_be_calibrated_is_refused_before_any_is_exported(here: Path) -> None:
    refused(here, 2, ["--precision int8", "--calibration-images"], *PLAIN, "--precision", "fp32,int8")


@pytest.mark.parametrize(
    "given", [["--unet", "none"], ["--clip", "none"], ["--parity-images", "3"], ["--parity-samples", "3"]]
)
def test_options_of_the_onnx_engines_are_refused_where_none_is_made(tmp_path: Path, given: list[str]) -> None:
    refused(tmp_path, 2, [given[0], "add onnx to --target"], "--target", "tensorrt-rtx", *given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"schedule": "scaled_linear"}, "a scaled_linear schedule is defined by them"),
        ({"schedule": "linear", "beta_start": 0.001}, "give both"),
        ({"schedule": "linear", "beta_start": 0.02, "beta_end": 0.001}, "the smaller first"),
        ({"schedule": "cosine", "beta_end": 0.02}, "leave `beta_end` out"),
    ],
)
def test_betas_are_said_where_they_define_a_schedule(given: dict[str, Any], words: str) -> None:
    asked = {"unet": "networks:Grey", "image_size": "8", "diffusion_steps": 10, "prediction": "epsilon"}
    refusal(lambda: open_unet(options(**asked, **given)), words)


def test_what_was_declared_is_in_the_sidecar(here: Path) -> None:
    """A network of one's own before the classifier that ships, compared on the shipped images."""
    given = "--unet networks:Grey --image-size 1x28x28 --schedule scaled_linear --diffusion-steps 500".split()
    given += "--beta-start 0.001 --beta-end 0.012".split()
    given += "--prediction v --variance fixed_large --clip=-2,2 --timestep-scale 2 --parity-images 2".split()
    done = command("export", *given, "--timestep-rule", "densepure", "--out", here / "engines")
    assert done.returncode == 0, done.stderr
    assert "made up" not in done.stderr
    sidecar = read_sidecar(here / "engines" / "unet.onnx")
    assert isinstance(sidecar, StepSidecar)
    assert sidecar.schedule == Schedule("scaled_linear", 500, 0.001, 0.012, timestep_scale=2.0)
    assert (sidecar.prediction, sidecar.variance, sidecar.clip) == ("v", "fixed_large", (-2.0, 2.0))
    assert (sidecar.image, sidecar.timestep_rule) == ((1, 28, 28), "densepure")
    done = command("certify", "--dry-run", "--engine", here / "engines" / "unet.onnx", "--max", 1, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "(densepure's rule)" in done.stderr


DEFAULT = "--unet networks:default --image-size 1x28x28 --diffusion-steps 1000 --parity-images 4".split()


def test_what_the_weights_of_a_unet_belie_is_one_warning_or_refused(here: Path) -> None:
    """The weights of the default model, declared as what they are not."""
    wrong = [*DEFAULT, *"--schedule linear --prediction v".split()]
    refused(here, 1, ["doubt --prediction", "--prediction epsilon", "declared v", "Nothing was"], *wrong, "--strict")
    cosine = [*DEFAULT, *"--schedule cosine --prediction epsilon --strict".split()]
    refused(here, 1, ["doubt --schedule", "--schedule linear", "declared cosine schedule"], *cosine)
    done = command("export", *wrong, "--out", here / "engines", "--json")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "warning" in line] == [done.stderr.splitlines()[-1]]
    assert "warning: doubt --prediction of the UNet: --prediction epsilon gives" in done.stderr
    found = json.loads(done.stdout)["onnx"]["fp32"]["denoising"]
    sidecar = read_sidecar(here / "engines" / "unet.onnx")
    assert isinstance(sidecar, StepSidecar)
    assert sidecar.denoising is not None
    assert (found["verdict"], sidecar.denoising.verdict) == ("doubted", "doubted")
    assert sidecar.denoising.error == found["error"]


def test_a_unet_as_it_was_trained_is_exported_without_a_warning(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph is the shipped one: tests/export/convert/test_to_onnx.py exports it, in ten seconds."""
    monkeypatch.setattr(to_onnx, "step_onnx", lambda *_: shipped_engine().read_bytes())
    given = [*DEFAULT, *"--schedule linear --prediction epsilon --strict".split()]
    done = command("export", *given, "--out", here / "engines")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert "denoising check: as declared; mean squared error" in done.stdout
    assert "linear shrinkage" in done.stdout


def test_without_a_unet_nothing_is_denoised(here: Path) -> None:
    done = command("export", *PLAIN, "--parity-images", 2, "--strict", "--out", here / "engines")
    assert done.returncode == 0, done.stderr
    assert "denoising" not in done.stderr + done.stdout
    sidecar = read_sidecar(here / "engines" / "unet.onnx")
    assert isinstance(sidecar, StepSidecar)
    assert sidecar.denoising is None


def test_order_of_attention_is_one_of_two_and_in_the_sidecar(tmp_path: Path) -> None:
    path = str(checkpoint(tmp_path, state()))
    refusal(lambda: open_unet(options(unet=path, attention_order="old", **AS_TRAINED)), "`attention_order` old", "new")
    model = open_unet(options(unet=path, attention_order="new", **AS_TRAINED))
    assert model.attention == "1 at every width, new order"
