"""Networks that are read from folders and declared by their users, against diffusers itself."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed, DensePureError, UsageError
from densepure_rt.export.convert.step_graph import StepGraph
from densepure_rt.export.convert.to_onnx import step_onnx
from densepure_rt.export.models.reference import reverse_step
from densepure_rt.export.models.unets import (
    DiffusionModel,
    declared_unet,
    diffusers_training,
    diffusers_unet,
    no_unet,
    refuse_odd,
    state_sha256,
)
from densepure_rt.runtime.bundle import Prediction
from densepure_rt.runtime.device import STEP_INPUTS, STEP_OUTPUTS
from densepure_rt.runtime.onnx_device import open_session
from densepure_rt.runtime.schedule import Coefficients, Schedule, ScheduleName, Variance, make_chain

IMAGE = (2, 8, 12)
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULES: dict[str, ScheduleName] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}
PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
VARIANCES: dict[str, Variance] = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}
FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@cache
def unet(outputs: int = 2) -> Any:
    """A small UNet of which every weight is random, those that training starts at zero or one too."""
    torch.manual_seed(outputs)
    network: Any = UNet2DModel(
        sample_size=(8, 12),
        in_channels=2,
        out_channels=outputs,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape)
    return network.eval()


def saved(folder: Path, outputs: int = 2, pipeline: bool = False, safe: bool = True, **training: Any) -> Path:
    """What diffusers saves of the network and of a scheduler with these settings."""
    unet(outputs).save_pretrained(folder / "unet" if pipeline else folder, safe_serialization=safe)
    scheduler: Any = DDPMScheduler(**training)
    scheduler.save_pretrained(folder / "scheduler" if pipeline else folder)
    if pipeline:
        index = {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        }
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to copy: the network and its scheduler."""
    return saved(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def states(items: int = 2) -> Tensor:
    return torch.randn(items, *IMAGE, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_folder_is_read_as_diffusers_wrote_it(tmp_path: Path, pipeline: bool, safe: bool) -> None:
    model = diffusers_unet(saved(tmp_path, pipeline=pipeline, safe=safe))
    assert model.image == IMAGE
    assert (model.schedule, model.timestep_rule) == (Schedule("linear", 1000), "nearest")
    assert (model.variance, model.prediction, model.clip) == ("fixed_small", "epsilon", (-1.0, 1.0))
    x, t = states(), torch.tensor([17.0, 801.5])
    with torch.inference_mode():
        torch.testing.assert_close(model.network(x, t), unet()(x, t).sample, rtol=0, atol=0)
    assert not any(module.training for module in model.network.modules())
    assert model.weights_sha256 == state_sha256(unet())


def test_half_precision_weights_are_read_as_float32(folder: Path) -> None:
    halves = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(halves, folder / WEIGHTS)
    network = diffusers_unet(folder).network
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}
    expected = {f"unet.{name}": tensor.float() for name, tensor in halves.items()}
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("learned"), outputs=4, variance_type="learned_range")


def with_training(folder: Path, **training: Any) -> tuple[DiffusionModel, Any]:
    """The model in `folder` with another scheduler's config beside it, and diffusers' own scheduler of that config."""
    (folder / "scheduler_config.json").unlink()
    scheduler: Any = DDPMScheduler(**training)
    scheduler.save_pretrained(folder)
    return diffusers_unet(folder), scheduler


@pytest.mark.parametrize("variance", list(VARIANCES))
@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize("prediction", list(PREDICTIONS))
def test_chain_of_a_saved_model_takes_the_steps_of_its_own_scheduler(
    whole: Path, learned: Path, prediction: str, schedule: str, variance: str, tmp_path: Path
) -> None:
    """sigma is that of a timestep, so that the chain's levels are the scheduler's; clipping on, narrower and off."""
    folder = shutil.copytree(learned if variance == "learned_range" else whole, tmp_path / "model")
    training: dict[str, Any] = {"beta_schedule": schedule, "prediction_type": prediction, "variance_type": variance}
    if schedule == "scaled_linear":
        training |= {"beta_start": 0.00085, "beta_end": 0.012}
    for clipping, clip in (({}, (-1, 1)), ({"clip_sample_range": 0.6}, (-0.6, 0.6)), ({"clip_sample": False}, None)):
        model, scheduler = with_training(folder, num_train_timesteps=400, **training, **clipping)
        assert (model.schedule.name, model.schedule.steps) == (SCHEDULES[schedule], 400)
        assert (model.prediction, model.variance) == (PREDICTIONS[prediction], VARIANCES[variance])
        assert model.clip == clip
        bar = float(scheduler.alphas_cumprod[150])
        chain = make_chain(model.schedule, model.variance, math.sqrt(1 / bar - 1) / 2, 3)
        assert chain.timesteps == (150, 100, 50)
        scheduler.set_timesteps(timesteps=list(chain.timesteps))
        graph = StepGraph(model.network, model.clip, model.learned_variance, model.prediction)
        x = states()
        for i, timestep in enumerate(chain.timesteps):
            t = torch.full((2,), float(timestep))
            with torch.inference_mode():
                output = unet(4 if variance == "learned_range" else 2)(x, t).sample
                draw = torch.Generator().manual_seed(timestep)
                theirs = scheduler.step(output, timestep, x, generator=draw)
                mean, std = reverse_step(model, x, t, Coefficients(*chain.coef[i].tolist()))
                row = torch.from_numpy(chain.coef[i]).expand(2, 6)
                graph_mean, graph_std, _ = graph(x, torch.zeros_like(x), torch.zeros_like(x), t, row)
            torch.testing.assert_close(graph_mean, mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(graph_std, std, rtol=1e-5, atol=1e-7)
            if i == 2:  # ours lands on x0; diffusers' chain goes on
                torch.testing.assert_close(mean, theirs.pred_original_sample, rtol=2e-3, atol=2e-3)
                assert not std.any()
                break
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(timestep))
            torch.testing.assert_close(mean + std * noise, theirs.prev_sample, rtol=2e-3, atol=2e-3)
            x = theirs.prev_sample


def test_exported_graph_of_a_saved_model_takes_the_step_of_diffusers(tmp_path: Path) -> None:
    training: dict[str, Any] = {
        "prediction_type": "v_prediction",
        "variance_type": "learned_range",
        "beta_schedule": "squaredcos_cap_v2",
    }
    model = diffusers_unet(saved(tmp_path, outputs=4, pipeline=True, **training))
    scheduler: Any = DDPMScheduler.from_pretrained(str(tmp_path), subfolder="scheduler")
    chain = make_chain(model.schedule, model.variance, 0.5, 3)
    scheduler.set_timesteps(timesteps=list(chain.timesteps))
    timestep, x = chain.timesteps[1], states(3)
    session = open_session(step_onnx(model), "step", STEP_INPUTS, STEP_OUTPUTS)
    zeros, told = np.zeros((3, *IMAGE), np.float32), np.repeat(chain.t[1:2], 3)
    feed = (x.numpy(), zeros, zeros, told, np.repeat(chain.coef[1:2], 3, axis=0))
    mean, std, finite = session.run(STEP_OUTPUTS, dict(zip(STEP_INPUTS, feed, strict=True)))
    with torch.inference_mode():
        output = unet(4)(x, torch.from_numpy(told)).sample
    theirs = scheduler.step(output, timestep, x, generator=torch.Generator().manual_seed(9)).prev_sample
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9)).numpy()
    np.testing.assert_allclose(mean + std * noise, theirs.numpy(), rtol=2e-3, atol=2e-3)
    assert finite.tolist() == [1.0] * 3


LINEAR_CONFIG = {"beta_schedule": "linear", "clip_sample": True}


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "PNDMScheduler"])
def test_scheduler_that_is_silent_on_clipping_needs_to_be_told(folder: Path, kind: str) -> None:
    (folder / SCHEDULER).write_text(json.dumps({"_class_name": kind, "beta_schedule": "linear"}))
    with pytest.raises(UsageError, match=r"does not say clip_sample: give `clip`=-1,1.*or `clip` none"):
        diffusers_unet(folder)
    assert diffusers_unet(folder, clip_given=True).schedule == Schedule("linear", 1000)


def test_variance_type_of_null_is_none_given() -> None:
    assert diffusers_training(LINEAR_CONFIG | {"variance_type": None}, Path("x"))["variance"] == "fixed_small"


def test_logarithmic_names_of_the_fixed_variances_mean_the_same_variances() -> None:
    for name, meant in (("fixed_small_log", "fixed_small"), ("fixed_large_log", "fixed_large")):
        found = diffusers_training(LINEAR_CONFIG | {"variance_type": name}, Path("x"))
        assert found["variance"] == meant


def test_configs_of_diffusers_before_prediction_types_are_read_as_they_were_meant() -> None:
    """predict_epsilon, of which 0.9 made prediction_type."""
    for old, meant in ((True, "epsilon"), (False, "x0")):
        found = diffusers_training(LINEAR_CONFIG | {"predict_epsilon": old}, Path("x"))
        assert found["prediction"] == meant


def test_image_size_of_the_command_line_goes_before_the_config_s(folder: Path) -> None:
    model = diffusers_unet(folder, (2, 16, 4))
    assert model.image == (2, 16, 4)
    assert model.network(torch.zeros(1, 2, 16, 4), torch.zeros(1)).shape == (1, 2, 16, 4)


@pytest.mark.parametrize(("size", "image"), [(16, (2, 16, 16)), ([4, 20], (2, 4, 20))])
def test_image_is_the_config_s(folder: Path, size: object, image: tuple[int, int, int]) -> None:
    change(folder / "config.json", sample_size=size)
    assert diffusers_unet(folder).image == image


def test_one_blocks_network_takes_odd_images_and_others_do_not(folder: Path) -> None:
    refuse_odd((3, 7, 5), 0)
    refuse_odd((3, 24, 8), 3)
    with pytest.raises(UsageError, match="`image_size` 28x24: .*halves its images 3 times, .*multiples of 8"):
        refuse_odd((1, 28, 24), 3)
    with pytest.raises(UsageError, match="`image_size` 8x7: .*halves its images 1 times"):
        diffusers_unet(folder, (2, 8, 7))


Damage = Callable[[Path], object]
SCHEDULER, CONFIG = "scheduler_config.json", "config.json"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda home: (home / CONFIG).unlink(), r"cannot read .*config\.json .*a diffusers UNet is a folder"),
        (lambda home: change(home / CONFIG, _class_name="UNet2DConditionModel"), "only UNet2DModel"),
        (lambda home: change(home / CONFIG, _class_name=None), "holds a None"),
        (lambda home: change(home / CONFIG, num_class_embeds=10), "num_class_embeds is 10"),
        (lambda home: change(home / CONFIG, class_embed_type="timestep"), "class_embed_type is timestep"),
        (lambda home: change(home / CONFIG, time_embedding_type="fourier"), "'fourier', so.*`prediction` denoiser"),
        (lambda home: change(home / CONFIG, sample_size=None), "sample_size None.*`image_size`"),
        (lambda home: change(home / CONFIG, sample_size=[8]), r"sample_size \[8\]"),
        (lambda home: change(home / CONFIG, sample_size=0), "sample_size 0"),
        (lambda home: change(home / CONFIG, sample_size=[8, 9]), "halves its images 1 times"),
        (lambda home: (home / SCHEDULER).unlink(), "no .*scheduler_config.json.*copy it from the pipeline"),
        (lambda home: change(home / SCHEDULER, trained_betas=[0.1, 0.2]), "trained_betas is set"),
        (lambda home: change(home / SCHEDULER, thresholding=True), "thresholding is set"),
        (lambda home: change(home / SCHEDULER, rescale_betas_zero_snr=True), "rescale_betas_zero_snr is set"),
        (lambda home: change(home / SCHEDULER, beta_schedule="sigmoid"), "beta_schedule 'sigmoid' is not supported"),
        (lambda home: change(home / SCHEDULER, variance_type="learned"), "variance_type 'learned' is not supported"),
        (lambda home: change(home / SCHEDULER, prediction_type="flow"), "prediction_type 'flow' is not supported"),
        (
            lambda home: (home / SCHEDULER).write_text(
                '{"_class_name": "CMStochasticIterativeScheduler", "num_train_timesteps": 40, "sigma_max": 80.0}'
            ),
            "CMStochasticIterativeScheduler, which has no beta_schedule",
        ),
        (lambda home: (home / WEIGHTS).unlink(), "holds no diffusion_pytorch_model.safetensors or .*download or copy"),
        (lambda home: (home / "vqvae").mkdir(), "has a vqvae: its UNet works on latents"),
    ],
)
def test_what_is_not_supported_is_a_usage_error_that_names_it(folder: Path, damage: Damage, words: str) -> None:
    damage(folder)
    with pytest.raises(UsageError, match=words):
        diffusers_unet(folder)


def rewritten(home: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(home / WEIGHTS)
    edit(state)
    save_file(state, home / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda home: (home / CONFIG).write_text("{"), "config.json is not valid JSON.*copy the folder again"),
        (lambda home: (home / CONFIG).write_bytes(b"\xff\xfe{}"), "config.json is not valid JSON"),
        (lambda home: (home / CONFIG).write_text("[" * 100_000), "config.json is not valid JSON"),
        (lambda home: (home / SCHEDULER).write_text("[1]"), "should hold a JSON object, found list"),
        (lambda home: change(home / SCHEDULER, num_train_timesteps="many"), "num_train_timesteps is 'many'"),
        (lambda home: change(home / SCHEDULER, num_train_timesteps=0), "num_train_timesteps is 0"),
        (lambda home: change(home / SCHEDULER, num_train_timesteps=True), "num_train_timesteps is True"),
        (lambda home: change(home / SCHEDULER, num_train_timesteps=9.5), "num_train_timesteps is 9.5"),
        (lambda home: change(home / SCHEDULER, num_train_timesteps=10**9), "num_train_timesteps is 1000000000"),
        (lambda home: change(home / SCHEDULER, beta_start=0.0), "beta_start is 0.0"),
        (lambda home: change(home / SCHEDULER, beta_start=0.5), "beta_end is 0.02, not a number from 0.5"),
        (lambda home: change(home / SCHEDULER, beta_end=1.0), "beta_end is 1.0"),
        (lambda home: change(home / SCHEDULER, beta_end=math.nan), "beta_end is nan"),
        (lambda home: change(home / SCHEDULER, clip_sample_range=None), "clip_sample_range is None"),
        (lambda home: change(home / SCHEDULER, clip_sample_range=-1.0), "clip_sample_range is -1.0"),
        (lambda home: change(home / SCHEDULER, clip_sample_range=math.inf), "clip_sample_range is inf"),
        (lambda home: change(home / SCHEDULER, variance_type="learned_range"), "out_channels is 2 for images of 2"),
        (lambda home: change(home / CONFIG, down_block_types=None), "diffusers cannot load"),
        (lambda home: change(home / CONFIG, down_block_types=["NoBlock", "DownBlock2D"]), "diffusers cannot load"),
        (lambda home: change(home / CONFIG, downsample_padding={}), "a network that cannot run"),
        (lambda home: change(home / CONFIG, block_out_channels=[8, 32]), "do not fit its config|cannot load"),
        (lambda home: change(home / CONFIG, layers_per_block=2), "size mismatch for up_blocks|missing keys"),
        (lambda home: os.truncate(home / WEIGHTS, 5000), "diffusers cannot load"),
        (lambda home: (home / WEIGHTS).write_bytes(b""), "holds no weights: it is empty: download"),
        (lambda home: rewritten(home, lambda state: state.pop("conv_in.weight")), "missing keys, first conv_in.weight"),
        (lambda home: rewritten(home, lambda state: state.update(more=torch.ones(1))), "unexpected keys, first more"),
        (
            lambda home: rewritten(home, lambda state: state.update({"conv_in.bias": torch.ones(9)})),
            "do not fit its config|cannot load",
        ),
    ],
)
def test_what_is_damaged_is_a_failed_check_that_says_where(folder: Path, damage: Damage, words: str) -> None:
    damage(folder)
    with pytest.raises(CheckFailed, match=words):
        diffusers_unet(folder)


def test_images_of_other_channels_are_refused_with_the_size_to_give(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"in_channels is 2, not the 3 .*`image_size` 2x8x12"):
        diffusers_unet(folder, (3, 8, 12))


def test_learned_variance_without_a_scheduler_that_says_so_is_found_out(learned: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(learned, tmp_path / "model")
    change(folder / SCHEDULER, variance_type="fixed_small")
    with pytest.raises(CheckFailed, match="out_channels is 4 for images of 2.*learned_range"):
        diffusers_unet(folder)


@pytest.mark.parametrize("path", ["nowhere", "model/config.json"])
def test_what_is_no_folder_is_a_usage_error(folder: Path, path: str) -> None:
    with pytest.raises(UsageError, match="a diffusers UNet is a folder"):
        diffusers_unet(folder.parent / path)


class Runs:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_pickled_weights_run_no_code(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Runs(tmp_path / "ran")}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckFailed, match="diffusers cannot load"):
        diffusers_unet(folder)
    assert not (tmp_path / "ran").exists()


@FUZZ
@given(st.data())
def test_any_scheduler_config_is_read_rightly_or_refused_in_words(whole: Path, data: st.DataObject) -> None:
    sound = json.loads((whole / SCHEDULER).read_text())
    names = data.draw(st.lists(st.sampled_from(sorted(sound)), min_size=1, max_size=3))
    config = sound | {name: data.draw(JSON) for name in names}
    for name in data.draw(st.lists(st.sampled_from(names), max_size=1)):
        del config[name]
    try:
        found = diffusers_training(config, whole / SCHEDULER)
    except DensePureError:
        return
    schedule, clip = found["schedule"], found["clip"]
    told = {name: config.get(name, sound[name]) for name in sound}
    assert SCHEDULES[told["beta_schedule"]] == schedule.name
    assert (schedule.steps, schedule.beta_start, schedule.beta_end) == (
        told["num_train_timesteps"],
        told["beta_start"],
        told["beta_end"],
    )
    assert PREDICTIONS[told["prediction_type"]] == found["prediction"]
    assert found["variance"] in (told["variance_type"] or "fixed_small")
    assert clip == ((-told["clip_sample_range"], told["clip_sample_range"]) if told["clip_sample"] else None)


@FUZZ
@given(st.data())
def test_any_network_config_is_read_or_refused_in_words(whole: Path, folder: Path, data: st.DataObject) -> None:
    sound = json.loads((whole / CONFIG).read_text())
    name = data.draw(st.sampled_from(sorted(sound)))
    config = sound | {name: data.draw(JSON.filter(lambda value: not isinstance(value, int) or value < 64))}
    (folder / CONFIG).write_text(json.dumps(config))
    try:
        model = diffusers_unet(folder)
    except DensePureError:
        return
    assert model.network(torch.zeros(1, *model.image), torch.zeros(1)).shape == (1, *model.image)


@FUZZ
@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode) | JSON.map(json.dumps).map(str.encode))
def test_any_bytes_in_place_of_a_config_are_refused_in_words(folder: Path, content: bytes) -> None:
    for name in (CONFIG, SCHEDULER):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        with pytest.raises(DensePureError):
            diffusers_unet(folder)
        (folder / name).write_bytes(before)


@FUZZ
@given(st.data())
def test_damaged_weights_are_refused_or_are_still_tensors_of_the_config(
    whole: Path, folder: Path, data: st.DataObject
) -> None:
    """In the header, that is: a flipped bit among the values is another value, and safetensors has no checksum."""
    content = bytearray((whole / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(0, header - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (folder / WEIGHTS).write_bytes(content)
    try:
        model = diffusers_unet(folder)
    except DensePureError:
        return
    found = {name.removeprefix("unet."): tensor for name, tensor in model.network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in unet().state_dict().items()
    }


class Declared(nn.Module):
    """Twice as many channels where `learned`; a buffer and a dropout that must be off."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4 if learned else 2, 3, padding=1)
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.float64))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.dropout(self.first(x)) + t[:, None, None, None]
        return output


LINEAR = Schedule("linear", 100)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range", "learned", "renoised"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0", "denoiser"])
def test_a_declared_network_is_what_its_user_says(prediction: Prediction, variance: Variance) -> None:
    network = Declared(learned=variance in ("learned_range", "learned"))
    model = declared_unet(network, IMAGE, LINEAR, prediction, variance, None)
    assert (model.image, model.schedule, model.prediction, model.variance) == (IMAGE, LINEAR, prediction, variance)
    assert model.network is network
    assert not network.dropout.training
    assert model.clip is None
    assert model.weights_sha256 == state_sha256(network)
    told = declared_unet(network, IMAGE, LINEAR, prediction, variance, (-0.5, 1.0), "f" * 64)
    assert (told.weights_sha256, told.clip) == ("f" * 64, (-0.5, 1.0))


class Returns(nn.Module):
    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.give(x, t)


def fails(error: Exception) -> Callable[[Tensor, Tensor], Any]:
    def give(x: Tensor, t: Tensor) -> Any:
        raise error

    return give


@pytest.mark.parametrize(
    ("give", "variance", "words"),
    [
        (
            fails(RuntimeError("no such thing\nat all")),
            "fixed_small",
            r"t \[2\] \(.*no such thing\).*check `image_size`",
        ),
        (fails(KeyError()), "fixed_small", r"\(KeyError\)"),
        (lambda x, t: x @ torch.ones(3, 3), "fixed_small", "does not take x"),
        (lambda x, t: (x,), "fixed_small", r"gives tuple for x \[2, 2, 8, 12\]"),
        (lambda x, t: {"sample": x}, "fixed_small", "gives dict"),
        (lambda x, t: None, "fixed_small", "gives NoneType"),
        (lambda x, t: x.numpy(), "fixed_small", "gives ndarray"),
        (lambda x, t: x[:, :, :-1], "fixed_small", r"gives \[2, 2, 7, 12\].*means \[2, 2, 8, 12\]"),
        (lambda x, t: x[:1], "fixed_small", r"gives \[1, 2, 8, 12\]"),
        (lambda x, t: x.reshape(2, 2, 8, 12), "fixed_small", r"does not take x \[3, 2, 8, 12\].*any batch"),
        (lambda x, t: x[:2], "fixed_small", r"gives \[2, 2, 8, 12\] for x \[3, 2, 8, 12\]"),
        (lambda x, t: torch.cat([x, x], 1), "fixed_small", r"gives \[2, 4, 8, 12\].*`variance` fixed_small means"),
        (lambda x, t: x, "learned_range", r"`variance` learned_range means \[2, 4, 8, 12\]"),
        (lambda x, t: x, "learned", r"`variance` learned means \[2, 4, 8, 12\].*second set of channels"),
        (lambda x, t: torch.cat([x, x], 1), "renoised", r"`variance` renoised means \[2, 2, 8, 12\]"),
    ],
)
def test_a_declared_network_that_is_not_that_is_a_usage_error(
    give: Callable[[Tensor, Tensor], Any], variance: Variance, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        declared_unet(Returns(give), IMAGE, LINEAR, "epsilon", variance, None)


def test_a_declared_network_that_takes_no_time_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="it must be a function of these two"):
        declared_unet(nn.Conv2d(2, 2, 3, padding=1), IMAGE, LINEAR, "epsilon", "fixed_small", None)


def test_ctrl_c_within_a_users_network_is_ctrl_c() -> None:
    def give(x: Tensor, t: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        declared_unet(Returns(give), IMAGE, LINEAR, "epsilon", "fixed_small", None)


def test_no_network_passes_pixels_as_they_are() -> None:
    model = no_unet((3, 5, 7))
    x = torch.randn(2, 3, 5, 7)
    assert torch.equal(model.network(x, torch.zeros(2)), x)
    assert (model.image, model.prediction, model.clip, model.schedule.continuous) == ((3, 5, 7), "none", None, True)
    assert model.weights_sha256 == hashlib.sha256().hexdigest()


def test_hash_is_of_names_types_shapes_and_values() -> None:
    """Spelled out from little-endian bytes."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.tensor([[1.0, -2.5]], dtype=torch.bfloat16))
            self.register_buffer("a", torch.tensor(7))
            self.register_buffer("c", torch.tensor([True, False]))
            self.register_buffer("d", torch.zeros(0, 3))

    expected = (
        b"a torch.int64 []\n" + (7).to_bytes(8, "little") + b"b torch.bfloat16 [1, 2]\n" + bytes.fromhex("803f20c0")
    )
    expected += b"c torch.bool [2]\n\x01\x00" + b"d torch.float32 [0, 3]\n"
    assert state_sha256(Named()) == hashlib.sha256(expected).hexdigest()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(width=32), min_size=6, max_size=6), st.integers(0, 5), st.integers(0, 31))
def test_hash_changes_with_any_bit_and_with_nothing_but_the_state(values: list[float], place: int, bit: int) -> None:
    class Holder(nn.Module):
        def __init__(self, tensor: Tensor, name: str = "w") -> None:
            super().__init__()
            self.register_buffer(name, tensor)

    tensor = torch.tensor(values).reshape(2, 3)
    strided = torch.stack([tensor, tensor], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    found = state_sha256(Holder(tensor))
    assert state_sha256(Holder(strided)) == state_sha256(Holder(tensor.clone()).train()) == found
    bits = np.array(values, np.float32).view(np.uint32)
    bits[place] ^= np.uint32(1 << bit)
    other = torch.from_numpy(bits.view(np.float32)).reshape(2, 3)
    different = [Holder(other), Holder(tensor.reshape(3, 2)), Holder(tensor, "v"), Holder(tensor.view(torch.int32))]
    assert len({found, *map(state_sha256, different)}) == 5
