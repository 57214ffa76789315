"""Weights from files that may come from anywhere: read without running what is in them, checked before they are used.

A file is a flat mapping of names to tensors, or mappings within mappings; those are flattened with dots, so that a
prefix such as `state_dict.` or `ema.` selects one of them as it selects `module.` of a flat file.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed, DensePureError, UsageError
from densepure_rt.files import opened
from densepure_rt.runtime.transport import transfer_fault

SAFETENSORS, PICKLED = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt", ".pth.tar")
CHECKPOINTS = SAFETENSORS + PICKLED
HUB_ID = re.compile(r"(?:https://huggingface\.co/|hf-hub:|hf:)?([\w.-]+/([\w.-]+))/?")
ZIP_MAGIC = b"PK\x03\x04"  # of what torch.save has written since 1.6; older files cannot be mapped into memory
MAX_DEPTH = 4  # of mappings within mappings; a pickle may hold one that holds itself
UNSAFE = re.compile(r"GLOBAL (\S+)|([\w.]+)`` must be imported to load")  # torch 2.13, _weights_only_unpickler.py
MAKE_SAFE = (
    "in the environment that made it, save its state dict alone: "
    "torch.save(model.state_dict(), 'weights.pt') or safetensors.torch.save_model(model, 'weights.safetensors')"
)
M = TypeVar("M", bound=nn.Module)


def is_checkpoint(name: Path | str) -> bool:
    """Say whether a file is named like a checkpoint."""
    return str(name).endswith(CHECKPOINTS)


def spec_hint(spec: str, parameter: str) -> str:
    """Say what to do about a model named in no known way, as the end of a message. parameter: that named it."""
    if os.path.isfile(spec):
        return "the file is there, but not its suffix among these; rename it to what it is"
    if hub := HUB_ID.fullmatch(spec):
        return (
            f"no such folder is here. Check its spelling; a model of the Hugging Face Hub is downloaded first, with "
            f'"hf download {hub[1]} --local-dir {hub[2]}", and named by that folder, `{parameter}` {hub[2]}'
        )
    return "check its spelling"


def read_state_dict(path: Path, prefix: str = "", parameter: str = "unet_prefix") -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU, mapped into memory where the format allows it.

    prefix: only names that start with it are taken, without it. parameter: what a caller of ours knows `prefix` by.

    Raises CheckFailed for a damaged file, UsageError for anything else than tensors where they are asked for.
    """
    content = _content(path)
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds a {_kind(content)}, not a state dict: {MAKE_SAFE}")
    entries = dict(_flat(content))
    taken = {name[len(prefix) :]: value for name, value in entries.items() if name.startswith(prefix)}
    if {"state", "param_groups"} <= {name.partition(".")[0] for name in taken}:
        raise UsageError(f"{path} is an optimizer's state (it holds param_groups): use the model or ema file beside it")
    nested = [f"{name}." for name, value in content.items() if isinstance(value, dict) and _holds_tensors(value)]
    if nested and not prefix:
        raise UsageError(
            f"{path} holds its tensors under {', '.join(map(repr, nested))}: choose with `{parameter}` {nested[0]}"
        )
    if not taken:
        raise UsageError(f"{path} holds nothing{_named(prefix)}: its names are like {_names_like(entries)}")
    for name, value in taken.items():
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{path} holds {prefix + name!r}, a {_kind(value)}, where only tensors belong: {MAKE_SAFE}"
            )
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise UsageError(f"{path} holds {prefix + name!r}, not a dense tensor with values: save it as a plain one")
    return {name: value.detach() for name, value in taken.items()}


def load_into(module: M, state: Mapping[str, Tensor], what: str, parameter: str = "unet_prefix", prefix: str = "") -> M:
    """`module`, in evaluation mode, with `state` as its weights: not copies, unless a type has to change.

    Names and shapes must be those of the module, floating types become the module's. The module may be on the meta
    device. what: the file or its part, for errors. parameter, prefix: with which `state` was read.

    Raises UsageError naming the first key that does not fit.
    """
    check_fit(module, state, what, parameter, prefix)
    expected = module.state_dict()
    module.load_state_dict({name: state[name].to(tensor.dtype) for name, tensor in expected.items()}, assign=True)
    return module.eval()


def check_fit(
    module: nn.Module, state: Mapping[str, Tensor], what: str, parameter: str = "unet_prefix", prefix: str = ""
) -> None:
    """Raises UsageError naming the first key of `state` that is missing, shaped otherwise or unexpected."""
    expected = module.state_dict()
    kind = type(module).__name__
    for name, tensor in expected.items():
        if name not in state:
            raise missing(name, f"{list(tensor.shape)} of a {kind}", state, what, parameter, prefix)
        found = state[name]
        if found.shape != tensor.shape:
            raise UsageError(
                f"{what} does not fit a {kind}: {prefix}{name} should be {list(tensor.shape)}, "
                f"found {list(found.shape)}: give the weights of this architecture"
            )
        if found.is_floating_point() != tensor.is_floating_point():
            raise UsageError(
                f"{what} does not fit a {kind}: {prefix}{name} should be {_short(tensor.dtype)}, "
                f"found {_short(found.dtype)}: give weights that are not quantized"
            )
    for name in state:
        if name not in expected:
            raise UsageError(
                f"{what} does not fit a {kind}, which has no {prefix}{name}: give the weights of this architecture"
                f"{prefix_hint(state, expected, parameter, prefix)}"
            )


def missing(
    name: str, expected: str, state: Mapping[str, Tensor], what: str, parameter: str = "unet_prefix", prefix: str = ""
) -> UsageError:
    """The error that says that `state` has no `name`, and under which prefix it has it."""
    fix = prefix_hint(state, [name], parameter, prefix)
    found = f"its names are like {_names_like(state)}" if not fix else "the name is there under a prefix"
    return UsageError(f"{what} has no {prefix}{name}, {expected}: {found}{fix}")


def prefix_hint(state: Mapping[str, Tensor], expected: Collection[str], parameter: str, prefix: str) -> str:
    """Which longer prefix would find all the names expected, as the end of a message; or nothing."""
    found = list(fitting_prefixes(state, expected))
    return f"; it fits with {' or '.join(f'`{parameter}` {prefix}{longer}' for longer in found[:3])}" if found else ""


def fitting_prefixes(names: Collection[str], expected: Collection[str]) -> Iterator[str]:
    """Every prefix, a dot at its end, under which `names` hold all that is expected."""
    first = next(iter(expected))
    for name in names:
        if name.endswith("." + first):
            prefix = name.removesuffix(first)
            if all(prefix + wanted in names for wanted in expected):
                yield prefix


def _content(path: Path) -> Any:
    """Return the content of the file, whatever it is."""
    if not is_checkpoint(path):
        raise UsageError(f"{path} is not named like a checkpoint: {', '.join(CHECKPOINTS)} are known; rename it")
    if not os.path.isfile(path):
        raise UsageError(f"no checkpoint at {path}: give the path of a file that is there")
    try:
        with opened(path, "model") as file:
            head = file.read(16)
    except OSError as error:
        raise UsageError(f"cannot read the checkpoint {path} ({error.strerror})") from error
    if fault := transfer_fault(path):
        raise CheckFailed(f"{path} is no checkpoint: {fault}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of formats that it then refuses
            return _read(path, is_zip=head.startswith(ZIP_MAGIC))
    except DensePureError:
        raise
    except pickle.UnpicklingError as error:
        if (wanted := UNSAFE.search(str(error))) is None:
            raise _unreadable(path, head, error) from None
        name = wanted[1] or wanted[2]
        raise UsageError(
            f"{path} holds more than tensors: to read it would call {name}, and code from a file is not run here: "
            f"{MAKE_SAFE}"
        ) from None  # the refused pickle's own message recommends to trust it
    except Exception as error:  # what the readers raise on a damaged file is not a closed list
        raise _unreadable(path, head, error) from error


def _read(path: Path, is_zip: bool) -> Any:
    if path.suffix in SAFETENSORS:
        return load_file(path)
    if is_zip:
        _check_archive(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _check_archive(path: Path) -> None:
    """Raises CheckFailed where a record is not what its checksum says: torch.load does not look."""
    with zipfile.ZipFile(path) as archive:
        if any(record.filename.endswith("/constants.pkl") for record in archive.infolist()):
            raise UsageError(f"{path} is a TorchScript program, not a state dict: {MAKE_SAFE}")
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise CheckFailed(f"{path} is a compressed archive, which torch.save does not write: unpack what is in it")
        if bad := archive.testzip():
            raise CheckFailed(f"{path} is damaged: {bad} in it does not have its checksum: download or copy it again")


def _unreadable(path: Path, head: bytes, error: Exception) -> CheckFailed:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, pickle.UnpicklingError):
        reason = "its pickle is broken"  # the message is torch's advice to trust the file
    return CheckFailed(
        f"{path} is damaged or not a checkpoint ({reason[:200]}; it starts with {head!r}): download or copy it again"
    )


def _flat(content: Mapping[Any, Any], above: str = "", depth: int = 1) -> Iterator[tuple[str, Any]]:
    """Names and values, mappings with string keys opened up and their names joined by dots."""
    for name, value in content.items():
        opened = isinstance(value, dict) and value and depth < MAX_DEPTH and all(isinstance(key, str) for key in value)
        if opened:
            yield from _flat(value, f"{above}{name}.", depth + 1)
        else:
            yield f"{above}{name}", value


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for _, value in _flat(content, depth=2))


def _names_like(names: Collection[str]) -> str:
    return ", ".join(islice(names, 3)) or "(none)"


def _named(prefix: str) -> str:
    return f" named {prefix}*" if prefix else ""


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
