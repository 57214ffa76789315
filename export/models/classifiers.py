"""Any supported classifier -> a `ClassifierModel` on pixels in [-1, 1], its preprocessing declared and inside.

    timm:NAME                  a model of timm, preprocessing as timm declares it
    FOLDER                     of transformers: config.json, model.safetensors, preprocessor_config.json
    package.module:function    a function that returns a torch.nn.Module
    FILE.pt2                   a program of torch.export.save
    FILE.onnx                  one image in, logits out

The last three say nothing of the pixels they want: that must be declared, and without it nothing is exported.

This module is long because the five kinds of source end in one declaration, which each must fill alike.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed, EnvironmentFault, UsageError
from densepure_rt.export.models.checkpoints import is_checkpoint, load_into, read_state_dict, spec_hint
from densepure_rt.export.models.onnx_classifiers import (
    OnnxNetwork,
    free_batch,
    only_input,
    refuse_fixed_batch,
    refuse_other_input,
)
from densepure_rt.export.models.onnx_files import read_onnx
from densepure_rt.export.models.preprocessing import ChannelOrder, Interpolation, Preprocess, Preprocessing
from densepure_rt.export.models.programs import built, exported_program, first_line
from densepure_rt.export.models.unets import read_config, state_sha256
from densepure_rt.export.models.weight_files import variant_note, weight_file
from densepure_rt.export.zoo.make_data import CLASS_NAMES
from densepure_rt.export.zoo.models import ZOO, Classifier, load_weights
from densepure_rt.optional import optional
from densepure_rt.runtime.bundle import read_class_names, sha256_of
from densepure_rt.text import printable

DRY_BATCHES = (2, 3)  # the exporter traces with two; a second size tells whether any will do
PREFIX = "classifier_prefix"
# transformers' image processors that were found to do what `transformers_preprocessing` says, but for rounding: see
# tests/export/models/test_classifiers.py. LevitImageProcessor, for one, means another resize by the same words.
PROCESSORS = (
    "ViT DeiT Beit ConvNext EfficientNet MobileNetV1 MobileNetV2 MobileViT PoolFormer Bit CLIP Siglip Pvt".split()
)
# What their classes do where a file is silent (transformers 5.23): not always nothing, so nothing is not assumed.
SILENT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("DeiT", "MobileNetV1", "MobileNetV2", "PoolFormer", "Bit", "CLIP"), ("do_center_crop",)),
    "MobileViT": ("do_center_crop", "do_flip_channel_order"),
    "EfficientNet": ("include_top",),
}
TRANSFORMERS = "a transformers classifier, with its model.safetensors,"
IMAGENET = "`pixel_range` 0,1 `mean` 0.485,0.456,0.406 `std` 0.229,0.224,0.225"  # torchvision's and most of timm's


@dataclass(frozen=True)
class ClassifierModel:
    """network: pixels [B, C, H, W] in [-1, 1] -> logits [B, K]. image: [C, H, W].

    preprocessing: what `network` does to pixels first, None where it takes them as they are. onnx, graph: the file that
    its rest is, which PyTorch cannot trace, and what was read from it; see `merged_onnx`. notes: what was chosen when
    it was opened, a sentence each, for whoever exports it.
    """

    network: nn.Module
    image: tuple[int, int, int]
    class_names: tuple[str, ...]
    weights_sha256: str
    preprocessing: Preprocessing | None = None
    onnx: Path | None = None
    graph: ModelProto | None = dataclasses.field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Declared:
    """A declaration of the pixels that a classifier expects; None: nothing was said. Fields as in Preprocessing."""

    scale: tuple[float, float] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: ChannelOrder | None = None
    resize: tuple[int, int] | None = None
    interpolation: Interpolation | None = None
    antialias: bool | None = None
    crop: tuple[int, int] | None = None

    def over(self, known: Preprocessing) -> Preprocessing:
        """`known` with what was said instead. A resize that was said ends the crop that was known."""
        said = {name: value for name, value in vars(self).items() if value is not None}
        if "resize" in said:
            said.setdefault("crop", None)
        return dataclasses.replace(known, **said)

    def alone(self, what: str, image: tuple[int, int, int]) -> Preprocessing:
        """Use the declaration alone, for a classifier that says nothing. Raises UsageError where that is not enough."""
        if (self.mean is None) != (self.std is None):
            raise UsageError(f"{what}: `mean` and `std` belong together; give both, or neither where it normalises")
        if self.scale is None:
            raise UsageError(
                f"{what} does not say what pixels it was trained on: declare it with `pixel_range`, `mean` and `std`, "
                f"and `resize` HEIGHTxWIDTH where it takes other than {image[1]}x{image[2]}. Usual are "
                f"{IMAGENET} (ImageNet), `pixel_range` 0,1 or 0,255 alone where the network normalises itself, and "
                f"`pixel_range`=-1,1 for pixels as the runtime has them"
            )
        return self.over(Preprocessing(self.scale, channels="grey" if image[0] == 1 else "RGB"))


def declare(
    pixel_range: str | None = None,
    mean: str | None = None,
    std: str | None = None,
    channel_order: str | None = None,
    resize: str | None = None,
    interpolation: str | None = None,
    antialias: bool | None = None,
    crop: str | None = None,
) -> Declared:
    """The command line's options as they were written: "0,1", "0.5,0.5,0.5", "BGR", "224" or "224x224"."""
    scale = _numbers("pixel_range", pixel_range, "0,1 or 0,255 or -1,1")
    if scale is not None and len(scale) != 2:
        raise UsageError(f"`pixel_range` {pixel_range}: two numbers, 0,1 or 0,255 or -1,1")
    orders: dict[str, ChannelOrder] = {"rgb": "RGB", "bgr": "BGR", "grey": "grey", "gray": "grey"}
    if channel_order is not None and channel_order.lower() not in orders:
        raise UsageError(f"`channel_order` {channel_order} is not known: RGB, BGR or grey")
    filters: dict[str, Interpolation] = {name: name for name in get_args(Interpolation)}
    if interpolation is not None and interpolation not in filters:
        raise UsageError(f"`interpolation` {interpolation} is not known: {', '.join(filters)}")
    return Declared(
        scale=None if scale is None else (scale[0], scale[1]),
        mean=_numbers("mean", mean, "one for each channel, such as 0.485,0.456,0.406"),
        std=_numbers("std", std, "one for each channel, such as 0.229,0.224,0.225"),
        channels=None if channel_order is None else orders[channel_order.lower()],
        resize=_size("resize", resize),
        interpolation=None if interpolation is None else filters[interpolation],
        antialias=antialias,
        crop=_size("crop", crop),
    )


def _numbers(parameter: str, text: str | None, like: str) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"`{parameter}` {text}: numbers with commas between, {like}") from None


def _size(parameter: str, text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if found is None:
        raise UsageError(f"`{parameter}` {text}: HEIGHTxWIDTH in pixels, such as 224x224, or one number for a square")
    return int(found[1]), int(found[2] or found[1])


class Preprocessed(nn.Module):
    """Pixels [B, C, H, W] in [-1, 1] -> logits [B, K]: a classifier behind its preprocessing.

    output: which of the classifier's outputs are the logits, see `logits_among`; "" for its only one.
    """

    def __init__(self, preprocess: Preprocess, classifier: nn.Module, output: str = "") -> None:
        super().__init__()
        self.preprocess = preprocess
        self.classifier = classifier
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        return outputs_of(self.classifier(self.preprocess(x)))[self.output]


def outputs_of(output: Any, name: str = "") -> dict[str, Tensor]:
    """Name the tensors that a network gives: "" for a tensor alone, "1" and "logits" within what holds them."""
    if isinstance(output, Tensor):
        return {name: output}
    if isinstance(output, Mapping):
        named = dict(output)
    elif hasattr(output, "_asdict"):  # a named tuple
        named = output._asdict()
    elif isinstance(output, tuple | list):
        named = dict(enumerate(output))
    else:
        named = dict(getattr(output, "__dict__", {}))
        named |= {"logits": logits} if isinstance(logits := getattr(output, "logits", None), Tensor) else {}
    found: dict[str, Tensor] = {}
    for key, value in named.items():
        if isinstance(value, Tensor | Mapping | tuple | list) or dataclasses.is_dataclass(value):
            found |= outputs_of(value, f"{name}.{key}" if name else str(key))
    return found


def logits_among(outputs: Mapping[str, Tensor], spec: str) -> str:
    """Return the name of the logits among a classifier's outputs: what is named so, else the only one so shaped.

    Raises UsageError where none is, or several may be: features [B, K] are no logits, and nothing else would tell.
    """
    if not outputs:
        raise UsageError(f"{spec} gives nothing with a tensor in it: it should return logits [B, K]")
    named = [name for name in outputs if name.rpartition(".")[2] == "logits"]
    if "logits" in named or len(named) == 1:
        return "logits" if "logits" in named else named[0]
    may_be = [name for name, found in outputs.items() if _one_number_a_class(found)]
    if len(outputs) == 1 or not may_be:
        return next(iter(outputs))  # whose shape is judged where classes are counted
    if len(may_be) > 1:
        raise UsageError(
            f"{spec} gives {len(outputs)} tensors, {described_outputs(outputs)}, and {' and '.join(may_be)} may all be "
            f"logits: wrap it so that it returns the logits alone, or name them 'logits' in a dictionary"
        )
    return may_be[0]


def _one_number_a_class(found: Tensor) -> bool:
    """Say whether a tensor has the shape of logits, or may be squeezed to it: [B], [B, K] or [B, K, 1, 1]."""
    return found.ndim > 0 and sum(size > 1 for size in found.shape[1:]) <= 1


def described_outputs(outputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {['B', *found.shape[1:]] if found.ndim else []}" for name, found in outputs.items())


@dataclass(frozen=True)
class _Loaded:
    """A classifier as its source gives it. class_names: None where the source has none."""

    network: nn.Module
    preprocessing: Preprocessing
    weights_sha256: str
    class_names: tuple[str, ...] | None = None
    onnx: Path | None = None
    graph: ModelProto | None = None
    notes: tuple[str, ...] = ()


def zoo_classifier(weights: Path = ZOO / "classifier.safetensors") -> ClassifierModel:
    """The default classifier, with the weights that ship with it or others that were trained by the same script."""
    return ClassifierModel(load_weights(Classifier(), weights), (1, 28, 28), CLASS_NAMES, sha256_of(weights))


def open_classifier(
    spec: str,
    image: tuple[int, int, int],
    *,
    labels: Path | None = None,
    weights: Path | None = None,
    prefix: str = "",
    declared: Declared | None = None,
) -> ClassifierModel:
    """The classifier that `spec` names (see the module), in evaluation mode and float32, for images [C, H, W].

    labels: a file of class names, one a line. weights: a checkpoint for timm:NAME or package.module:function; prefix:
    of the names in it. declared: what it wants of pixels, over what the source itself says.

    Raises UsageError or CheckFailed for what cannot be used, EnvironmentFault where a package is missing.
    """
    load = _loader(spec)
    if weights is not None and load not in (_timm, _callable):
        raise UsageError(f"`classifier_weights` {weights}: {spec} has its own; leave one of them out")
    if prefix and weights is None:
        raise UsageError(f"`{PREFIX}` {prefix} is of the names in `classifier_weights`: give both, or neither")
    loaded = load(spec, image, weights, prefix, declared or Declared())
    loaded.network.requires_grad_(False)
    network = Preprocessed(Preprocess(loaded.preprocessing, image), loaded.network.float()).eval()
    count, chosen = logits_found(network, image, spec)
    names = _class_names(labels, loaded.class_names, count)
    return ClassifierModel(
        network,
        image,
        names,
        loaded.weights_sha256,
        loaded.preprocessing,
        loaded.onnx,
        loaded.graph,
        (*loaded.notes, *chosen),
    )


_Loader = Callable[[str, tuple[int, int, int], Path | None, str, Declared], _Loaded]


def _loader(spec: str) -> _Loader:
    if spec.startswith("timm:"):
        return _timm
    path = Path(spec)
    if os.path.isdir(path):  # unlike Path.is_dir, it takes any name for an answer
        return _transformers
    if path.suffix in (".onnx", ".pt2"):
        if not os.path.isfile(path):
            raise UsageError(f"no classifier at {path}: give `classifier` a file that is there")
        return _onnx if path.suffix == ".onnx" else _program
    if re.fullmatch(r"[\w.]+:[\w.]+", spec):
        return _callable
    if is_checkpoint(spec) and os.path.isfile(path):
        raise UsageError(
            f"`classifier` {spec} is a checkpoint, which holds weights and no network: give `classifier` timm:NAME or "
            f"package.module:function, and `classifier_weights` {spec}"
        )
    raise UsageError(
        f"`classifier` {spec} is none of timm:NAME, a transformers folder, package.module:function, a .pt2 or an .onnx "
        f"file: {spec_hint(spec, 'classifier')}"
    )


def logits_found(network: Preprocessed, image: tuple[int, int, int], spec: str) -> tuple[int, tuple[str, ...]]:
    """K, from DRY_BATCHES images of mid-grey, and a note where there was a choice; `network.output` is set to it.

    Raises UsageError when there are no logits [B, K].
    """
    shape, counts = network.preprocess.shape, list[int]()
    outputs: dict[str, Tensor] = {}
    for batch in DRY_BATCHES:
        try:
            with torch.inference_mode():
                outputs = outputs_of(network.classifier(network.preprocess(torch.zeros(batch, *image))))
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"{spec} does not take what preprocessing makes of {list(image)}, float32 {[batch, *shape]} "
                f"({first_line(error)}): see `resize` and `channel_order`, and let it take any batch"
            ) from error
        if not counts:
            network.output = logits_among(outputs, spec)
        logits = outputs[network.output]
        if logits.ndim != 2 or logits.shape[0] != batch or logits.shape[1] < 2:
            raise UsageError(
                f"{spec} gives {list(logits.shape)} for a batch of {batch}: a classifier gives logits [{batch}, K] "
                f"of two classes or more"
            )
        counts.append(int(logits.shape[1]))
    if len(set(counts)) > 1:
        raise UsageError(f"{spec} gives {counts} classes for batches of {list(DRY_BATCHES)}: let it take any batch")
    if len(outputs) == 1:
        return counts[0], ()
    return counts[0], (
        f"taking {network.output} [B, {counts[0]}] of {spec}'s outputs ({described_outputs(outputs)}) as logits of "
        f"{counts[0]} classes",
    )


def _class_names(labels: Path | None, known: tuple[str, ...] | None, count: int) -> tuple[str, ...]:
    """A file's lines, else what the model says, else "0" to "K-1"."""
    if labels is None:
        names = known if known is not None and len(known) == count else tuple(map(str, range(count)))
        return tuple(map(printable, names))
    return read_class_names(labels, count)


def _callable(spec: str, image: tuple[int, int, int], weights: Path | None, prefix: str, declared: Declared) -> _Loaded:
    preprocessing = declared.alone(spec, image)
    network = built(spec)
    if weights is not None:
        state = read_state_dict(weights, prefix, PREFIX)
        network = load_into(network, state, str(weights), PREFIX, prefix)
    return _Loaded(network, preprocessing, sha256_of(weights) if weights else state_sha256(network))


def _program(spec: str, image: tuple[int, int, int], weights: Path | None, prefix: str, declared: Declared) -> _Loaded:
    preprocessing = declared.alone(spec, image)
    return _Loaded(exported_program(Path(spec)), preprocessing, sha256_of(Path(spec)))


def _needs(package: str, spec: str) -> AbstractContextManager[None]:
    return optional(spec, package, "run \"pip install 'densepure-rt[classifiers]'\"")


def _timm(spec: str, image: tuple[int, int, int], weights: Path | None, prefix: str, declared: Declared) -> _Loaded:
    """A model of timm with its own pretrained weights, downloaded by timm, or with those of a file."""
    with _needs("timm", spec):  # optional, and without types: mypy finds none, where it is installed and where not
        import timm  # type: ignore[import-not-found, unused-ignore]
        from timm.data import resolve_model_data_config  # type: ignore[import-not-found, unused-ignore]
    name = spec.removeprefix("timm:")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 4)
        raise UsageError(f"timm {timm.__version__} has no model {name}; it has {', '.join(near) or 'nothing alike'}")
    if weights is None:
        try:
            network = timm.create_model(name, pretrained=True)
        except Exception as error:
            raise EnvironmentFault(
                f"timm did not get the weights of {name} ({first_line(error)}): download them elsewhere and give "
                f"`classifier_weights` FILE"
            ) from error
        digest = state_sha256(network)
    else:
        state = read_state_dict(weights, prefix, PREFIX)
        network = timm.create_model(name, pretrained=False)
        head = network.pretrained_cfg.get("classifier")
        found = state.get(f"{head}.weight") if isinstance(head, str) else None
        if found is not None and found.shape[0] != network.num_classes:  # a model tuned on other classes
            network = timm.create_model(name, pretrained=False, num_classes=found.shape[0])
        network, digest = load_into(network, state, str(weights), PREFIX, prefix), sha256_of(weights)
    return _Loaded(network, declared.over(timm_preprocessing(resolve_model_data_config(network), image)), digest)


def timm_preprocessing(config: Mapping[str, Any], image: tuple[int, int, int]) -> Preprocessing:
    """Read timm's data configuration, except its crop: the whole image is resized to the input size.

    That is DensePure's way; timm's own evaluation resizes to the input size / crop_pct and crops.
    """
    channels, height, width = config["input_size"]
    interpolation = config["interpolation"]
    return Preprocessing(
        scale=(0.0, 1.0),
        mean=tuple(map(float, config["mean"])),
        std=tuple(map(float, config["std"])),
        channels="grey" if channels == 1 else "RGB",
        resize=None if (height, width) == image[1:] else (height, width),
        interpolation=interpolation if interpolation in ("bilinear", "nearest") else "bicubic",
    )


def _transformers(
    spec: str, image: tuple[int, int, int], weights: Path | None, prefix: str, declared: Declared
) -> _Loaded:
    folder = Path(spec)
    config = read_config(folder / "config.json", TRANSFORMERS)
    held = weight_file(folder, {"safetensors": "model"})
    if "auto_map" in config:
        raise CheckFailed(f"{folder / 'config.json'} brings code of its own (auto_map): it is not run here")
    if declared.scale is not None and declared.mean is not None and declared.std is not None:
        preprocessing = declared.alone(spec, image)
    else:
        wanted = read_config(folder / "preprocessor_config.json", TRANSFORMERS)
        preprocessing = declared.over(transformers_preprocessing(wanted, image, config.get("num_channels", 3)))
    with _needs("transformers", spec):  # optional, as timm, and not typed throughout
        from transformers import AutoModelForImageClassification  # type: ignore[import-not-found, unused-ignore]
        from transformers.utils import logging  # type: ignore[import-not-found, unused-ignore]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    try:
        network, info = AutoModelForImageClassification.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            variant=held.variant or None,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        raise UsageError(f"transformers cannot load {folder} as an image classifier ({first_line(error)})") from error
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):  # it makes up what it does not find
        if info.get(what):
            first = sorted(map(str, info[what]))[0]
            raise UsageError(
                f"{held.path} is not a {type(network).__name__}: {what.replace('_', ' ')}, first {first}: save the "
                f"classifier itself, with its head"
            )
    ids = {int(key): str(value) for key, value in network.config.id2label.items()}
    names = tuple(ids[key] for key in sorted(ids))
    return _Loaded(network, preprocessing, held.sha256(), names, notes=variant_note(held))


def transformers_preprocessing(
    config: Mapping[str, Any], image: tuple[int, int, int], channels: int = 3
) -> Preprocessing:
    """Read a preprocessor_config.json. Raises UsageError for what a Preprocessing cannot express.

    Files from before do_rescale mean true by leaving it out; what else decides of the pixels must be there. The resize
    is antialiased as Pillow's, on floats: transformers resizes uint8, which rounds and clips to whole levels.
    """
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    name = re.sub("(ImageProcessor(Fast|Pil)?|FeatureExtractor)$", "", kind)
    if name not in PROCESSORS or config.get("do_pad"):
        raise UsageError(
            f"preprocessor_config.json is of a {kind}; known are {', '.join(PROCESSORS)}, without padding: declare "
            f"`pixel_range`, `mean`, `std`, `resize` and `channel_order` instead"
        )
    for step, setting in (("do_resize", "size"), ("do_center_crop", "crop_size"), ("do_normalize", "image_mean")):
        if setting in config and step not in config:  # the default depends on the kind
            raise UsageError(f"preprocessor_config.json has {setting} but no {step}: write true or false into it")
    required = ["do_resize", *(["resample"] if config.get("do_resize") else []), "do_normalize", *SILENT.get(name, ())]
    if missing := [step for step in required if step not in config]:
        raise UsageError(
            f"preprocessor_config.json does not say {', '.join(missing)}, which the class of {kind} decides: save the "
            f"processor again with save_pretrained, write into it what is meant, or declare all of `pixel_range`, "
            f"`mean`, `std` and `resize` instead"
        )
    resize: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    filters: dict[int, Interpolation] = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
    resample = config.get("resample", 2)
    try:
        if config.get("do_resize"):
            if resample not in filters:
                raise UsageError(f"preprocessor_config.json has resample {resample}: 0, 2 and 3 are known")
            resize = _resized(config["size"], image, config.get("crop_pct"))
            if "crop_pct" in config and (target := config["size"].get("shortest_edge", 0)) < 384:
                crop = (target, target)  # transformers' ConvNextImageProcessor
        if config.get("do_center_crop"):
            crop = _resized(config["crop_size"], (channels, 1, 1))
        low, high = 0.0, 255.0
        if config.get("do_rescale", True):
            offset = 1.0 if config.get("rescale_offset") else 0.0
            low, high = (level * float(config.get("rescale_factor", 1 / 255)) - offset for level in (low, high))
        if config.get("do_normalize"):
            mean, std = (tuple(map(float, np.ravel(config[key]))) for key in ("image_mean", "image_std"))
            if config.get("include_top"):
                std = tuple(value**2 for value in std)  # EfficientNetImageProcessor divides once more
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"preprocessor_config.json is not understood ({first_line(error)})") from error
    colour: ChannelOrder = "BGR" if config.get("do_flip_channel_order") else "RGB"
    return Preprocessing(
        scale=(low, round(high, 9)),
        mean=mean,
        std=std,
        channels="grey" if channels == 1 else colour,
        resize=None if resize == image[1:] else resize,
        interpolation=filters[resample],
        crop=None if crop == (resize or image[1:]) else crop,
    )


def _resized(size: Any, image: tuple[int, int, int], crop_pct: float | None = None) -> tuple[int, int]:
    """[height, width] of transformers' sizes for an image: {height, width}, {shortest_edge}, or a number for a square.

    crop_pct: of ConvNextImageProcessor, which below 384 resizes to more and crops.
    """
    if isinstance(size, int):
        if image[1] != image[2]:
            raise UsageError(f"preprocessor_config.json has the size {size}, the images are {image[1]}x{image[2]}")
        return size, size
    if "shortest_edge" not in size:
        return int(size["height"]), int(size["width"])
    target = int(size["shortest_edge"])
    if crop_pct is not None and target >= 384:
        return target, target
    short = target if crop_pct is None else int(target / crop_pct)
    height, width = (int(short * side / min(image[1:])) for side in image[1:])
    return height, width


def _onnx(spec: str, image: tuple[int, int, int], weights: Path | None, prefix: str, declared: Declared) -> _Loaded:
    path = Path(spec)
    preprocessing = declared.alone(spec, image)
    shape = Preprocess(preprocessing, image).shape
    model, digest = read_onnx(path)
    value = only_input(model, path.name)
    refuse_other_input(value, shape, str(path))
    batch = value.type.tensor_type.shape.dim[0].dim_value
    if batch:
        refuse_fixed_batch(model, (batch, *shape), path.name)
    return _Loaded(OnnxNetwork(free_batch(model), path.name), preprocessing, digest, onnx=path, graph=model)
