from __future__ import annotations

import argparse
import os
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed, DensePureError, UsageError
from densepure_rt.export.models.checkpoints import load_into, read_state_dict

FORMATS = [".safetensors", ".pt", ".pth", ".bin", "legacy.pt"]
RAN: list[str] = []  # what files got to run


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))


def plain(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.state_dict())


def written(folder: Path, kind: str, content: Any) -> Path:
    path = folder / f"weights{kind}"
    if kind == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=not kind.startswith("legacy"))
    return path


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


class Evil:
    """Pickled as a call, which notes that it was made and makes a file."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> Any:
        return self.call, self.args


def note(what: str) -> str:
    RAN.append(what)
    return what


# Reading


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_tensors_that_were_saved(tmp_path: Path, kind: str) -> None:
    state = plain(network())
    found = read_state_dict(written(tmp_path, kind, state))
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in state.items()}
    assert same(dict(sorted(found.items())), dict(sorted(state.items())))  # safetensors orders by type


@pytest.mark.parametrize("kind", FORMATS)
def test_prefix_selects_and_is_stripped(tmp_path: Path, kind: str) -> None:
    ours, others = plain(network(1)), plain(network(2))
    flat = {f"model.{n}": t for n, t in ours.items()} | {f"ema.{n}": t for n, t in others.items()}
    path = written(tmp_path, kind, flat)
    for prefix, expected in (("model.", ours), ("ema.", others)):
        assert same(dict(sorted(read_state_dict(path, prefix).items())), dict(sorted(expected.items())))


def test_nested_state_dict_is_selected_like_a_flat_one(tmp_path: Path) -> None:
    ours, others = plain(network(1)), plain(network(2))
    content = {"epoch": 3, "model": {"net": OrderedDict(ours)}, "ema": others, "args": [1, "x"]}
    path = written(tmp_path, ".pt", content)
    assert same(read_state_dict(path, "model.net."), ours)
    assert same(read_state_dict(path, "ema."), others)
    assert list(read_state_dict(path, "model.")) == [f"net.{name}" for name in ours]


def test_parameters_come_as_tensors_without_a_gradient(tmp_path: Path) -> None:
    path = written(tmp_path, ".pt", {"w": nn.Parameter(torch.ones(3))})
    (tensor,) = read_state_dict(path).values()
    assert not tensor.requires_grad
    assert type(tensor) is Tensor


@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
def test_weights_are_mapped_and_never_copied(tmp_path: Path, kind: str) -> None:
    """64 MB of weights in a module that holds them, and less than 16 MB of private memory more than before."""
    path = written(tmp_path, kind, {"weight": torch.ones(4096, 4096)})

    def private_kib() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = private_kib()
    with torch.device("meta"):
        module = nn.Linear(4096, 4096, bias=False)
    loaded = load_into(module, read_state_dict(path), "it")
    assert float(loaded.weight.detach().sum()) == 4096 * 4096
    if kind == ".pt":  # safetensors reads; torch maps
        assert private_kib() - before < 16 * 1024
    state = read_state_dict(path)
    assert load_into(module, state, "it").weight.data_ptr() == state["weight"].data_ptr()


# Refusing


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.pt", tmp_path / "gone.safetensors", tmp_path / "folder.pt"):
        (tmp_path / "folder.pt").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=rf"no checkpoint at .*{path.name}: give the path"):
            read_state_dict(path)


def test_file_of_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"weights\.onnx is not named like a checkpoint: \.safetensors, \.pt"):
        read_state_dict(tmp_path / "weights.onnx")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, ".pt", plain(network()))
    path.chmod(0)
    with pytest.raises(UsageError, match=r"cannot read the checkpoint .*Permission denied"):
        read_state_dict(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("content", [b"not found", b"\x00" * 4096])
def test_what_is_no_checkpoint_is_said_to_be_none_with_its_first_bytes(
    tmp_path: Path, kind: str, content: bytes
) -> None:
    path = tmp_path / f"weights{kind}"
    path.write_bytes(content)
    with pytest.raises(CheckFailed, match="is damaged or not a checkpoint .*download or copy it again") as caught:
        read_state_dict(path)
    assert repr(content[:16]) in str(caught.value)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.999])
def test_truncated_file_is_damaged(tmp_path: Path, kind: str, share: float) -> None:
    path = written(tmp_path, kind, plain(network()))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckFailed, match="damaged"):
        read_state_dict(path)


def test_archive_with_a_changed_weight_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = written(tmp_path, ".pt", {"w": torch.full((100,), 1.25)})
    whole = path.read_bytes()
    place = whole.index(struct.pack("<f", 1.25) * 100)
    path.write_bytes(whole[: place + 40] + b"\x7f" + whole[place + 41 :])
    with pytest.raises(CheckFailed, match=r"weights\.pt is damaged: weights/data/0 in it does not have its checksum"):
        read_state_dict(path)


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, ".pt", {"w": torch.zeros(100_000)})
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    with pytest.raises(CheckFailed, match="compressed archive"):
        read_state_dict(tmp_path / "bomb.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize(
    ("call", "name"),
    [(os.system, r"(posix|nt)\.system"), (eval, r"([\w.]*\.)?eval"), (note, r"[\w.]*note")],
)
def test_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, kind: str, call: Any, name: str
) -> None:
    mark = tmp_path / "ran"
    argument = {os.system: f"touch {mark}", eval: f"__import__('pathlib').Path({str(mark)!r}).touch()", note: "ran"}[
        call
    ]
    content = {"w": torch.zeros(3), "extra": Evil(call, argument)}
    path = tmp_path / "evil.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    RAN.clear()
    with pytest.raises(UsageError, match=rf"would call {name}, .*torch\.save\(model\.state_dict\(\)") as caught:
        read_state_dict(path)
    assert not mark.exists()
    assert RAN == []
    assert "weights_only" not in str(caught.value)  # torch's advice is to trust the file
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists() or RAN == ["ran"]  # the file was armed


def test_file_that_holds_a_whole_module_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(network(), path)
    with pytest.raises(
        UsageError, match=r"would call torch\.nn\.modules\.\S+, .*in the environment that made it.*safetensors"
    ):
        read_state_dict(path)


def test_checkpoint_with_its_options_in_a_namespace_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, ".pt", {"model": plain(network()), "args": argparse.Namespace(lr=0.1)})
    with pytest.raises(UsageError, match=r"would call argparse\.Namespace"):
        read_state_dict(path, "model.")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.trace(network().eval(), torch.zeros(1, 2, 4, 4)).save(str(path))
    with pytest.raises(UsageError, match=r"TorchScript program.*save its state dict"):
        read_state_dict(path)


@pytest.mark.parametrize("kind", [".pt", "legacy.pt"])
def test_optimizer_s_file_is_told_from_the_model_s(tmp_path: Path, kind: str) -> None:
    module = network()
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.zeros(2, 2, 4, 4)).sum().backward()
    optimizer.step()
    message = "is an optimizer's state .*use the model or ema file"
    with pytest.raises(UsageError, match=message):
        read_state_dict(written(tmp_path, kind, optimizer.state_dict()))
    both = written(tmp_path, kind, {"model": plain(module), "optimizer": optimizer.state_dict()})
    with pytest.raises(UsageError, match=message):
        read_state_dict(both, "optimizer.")
    assert same(read_state_dict(both, "model."), plain(module))


def test_nested_state_dict_names_the_keys_that_hold_tensors_and_the_option(tmp_path: Path) -> None:
    state = plain(network())
    content = {"epoch": 7, "state_dict": state, "ema": state, "optimizer": {"state": {0: state}, "param_groups": []}}
    path = written(tmp_path, ".pt", content)
    with pytest.raises(UsageError, match=r"under 'state_dict\.', 'ema\.': choose with `unet_prefix` state_dict\.$"):
        read_state_dict(path)
    with pytest.raises(UsageError, match=r"choose with `classifier_prefix` state_dict\.$"):
        read_state_dict(path, parameter="classifier_prefix")


@pytest.mark.parametrize(
    ("value", "words"),
    [(3, "int"), ("text", "str"), ([torch.zeros(1)], "list"), (None, "NoneType"), ({1: torch.zeros(1)}, "dict")],
)
def test_value_that_is_no_tensor_is_named(tmp_path: Path, value: object, words: str) -> None:
    path = written(tmp_path, ".pt", {"net.w": torch.zeros(2), "net.odd": value})
    with pytest.raises(UsageError, match=rf"holds 'net\.odd', a {words}, where only tensors belong"):
        read_state_dict(path, "net.")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.empty(3, device="meta"),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "quantized"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_tensor_without_plain_values_is_named(tmp_path: Path, make: Callable[[], Tensor]) -> None:
    path = written(tmp_path, ".pt", {"odd": make()})
    with pytest.raises(UsageError, match="holds 'odd', not a dense tensor"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [[torch.zeros(1)], torch.zeros(2), 3, "x"])
def test_content_that_is_no_mapping_is_named(tmp_path: Path, content: object) -> None:
    path = written(tmp_path, ".pt", content)
    kind = "torch.Tensor" if isinstance(content, Tensor) else type(content).__name__
    with pytest.raises(UsageError, match=rf"holds a {kind}, not a state dict"):
        read_state_dict(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_prefix_that_matches_nothing_shows_the_names(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path, kind, {"net.weight": torch.zeros(1)})
    with pytest.raises(UsageError, match=r"nothing named ema\.\*: its names are like net\.weight"):
        read_state_dict(path, "ema.")
    with pytest.raises(UsageError, match=r"holds nothing: its names are like \(none\)"):
        read_state_dict(written(tmp_path, kind, {}))


def test_mapping_that_holds_itself_ends(tmp_path: Path) -> None:
    loop: dict[str, Any] = {"w": torch.zeros(1)}
    loop["again"] = loop
    path = written(tmp_path, ".pt", loop)
    with pytest.raises(UsageError, match=r"under 'again\.'"):
        read_state_dict(path)
    with pytest.raises(UsageError, match=r"holds 'again\.again\.again\.again', a dict"):
        read_state_dict(path, "again.")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("sound")
    return {kind: written(folder, kind, plain(network())).read_bytes() for kind in (".safetensors", ".pt", "legacy.pt")}


@pytest.mark.parametrize("kind", [".safetensors", ".pt", "legacy.pt"])
@settings(max_examples=150, deadline=None)
@given(draw=st.randoms(use_true_random=False), cut=st.booleans(), flips=st.integers(0, 4))
def test_damaged_file_is_a_clear_error_or_what_it_was(
    sound: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    draw: random.Random,
    cut: bool,
    flips: int,
) -> None:
    """Bits flip anywhere, half of them in the first kilobyte, where the structure is. A changed zip is always found."""
    content = bytearray(sound[kind])
    for _ in range(flips):
        content[draw.randrange(draw.choice((len(content), 1024)))] ^= 1 << draw.randrange(8)
    if cut:
        del content[draw.randrange(len(content)) :]
    path = tmp_path_factory.getbasetemp() / f"fuzzed{kind}"
    path.write_bytes(content)
    message = ""
    try:
        found = read_state_dict(path)
        load_into(network(3), found, str(path))
    except DensePureError as error:
        message = str(error)
    if message:
        assert str(path) in message
    elif bytes(content) == sound[kind]:
        assert same(dict(sorted(found.items())), dict(sorted(plain(network()).items())))
    else:
        assert set(found) == set(plain(network()))
    assert not message or bytes(content) != sound[kind]


# Loading


def test_module_holds_the_very_tensors_in_evaluation_mode() -> None:
    state = plain(network(5))
    module = load_into(network(6).train(), state, "it")
    assert not any(part.training for part in module.modules())
    for name, tensor in module.state_dict().items():
        assert tensor.data_ptr() == state[name].data_ptr()


def test_module_on_the_meta_device_is_filled() -> None:
    with torch.device("meta"):
        empty = nn.Linear(3, 2)
    state = plain(nn.Linear(3, 2))
    found = load_into(empty, state, "it")(torch.ones(1, 3))
    torch.testing.assert_close(found[0], state["weight"].sum(1) + state["bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_types_become_the_module_s(dtype: torch.dtype) -> None:
    state = {"weight": torch.tensor([[1.5, -2.25]], dtype=dtype), "bias": torch.tensor([0.5], dtype=dtype)}
    module = load_into(nn.Linear(2, 1), state, "it")
    assert module.weight.dtype == module.bias.dtype == torch.float32
    assert module.weight.tolist() == [[1.5, -2.25]]


def test_first_missing_key_is_named() -> None:
    state = plain(network())
    del state["1.bias"], state["3.weight"]
    with pytest.raises(UsageError, match=r"weights\.pt has no 1\.bias, \[3\] of a Sequential: its names are like 0\."):
        load_into(network(), state, "weights.pt")


def test_first_unexpected_key_is_named() -> None:
    state = plain(network()) | {"4.weight": torch.zeros(1), "5.weight": torch.zeros(1)}
    with pytest.raises(UsageError, match=r"weights\.pt does not fit a Sequential, which has no 4\.weight"):
        load_into(network(), state, "weights.pt")


def test_first_wrong_shape_is_named_with_both() -> None:
    state = plain(network()) | {"3.weight": torch.zeros(5, 13)}
    with pytest.raises(UsageError, match=r"ema\.3\.weight should be \[5, 12\], found \[5, 13\]"):
        load_into(network(), state, "weights.pt", prefix="ema.")


def test_integer_weights_are_not_taken_for_floats() -> None:
    state = plain(network()) | {"3.weight": torch.zeros(5, 12, dtype=torch.int8)}
    with pytest.raises(UsageError, match=r"3\.weight should be float32, found int8.*not quantized"):
        load_into(network(), state, "weights.pt")


@pytest.mark.parametrize("prefix", ["module.", "model.", "ema_model.", "model.diffusion_model."])
def test_common_prefix_is_found_and_the_option_named(prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in plain(network()).items()}
    with pytest.raises(UsageError, match=rf"it fits with `unet_prefix` {prefix}$"):
        load_into(network(), state, "weights.pt")
    with pytest.raises(UsageError, match=rf"it fits with `classifier_prefix` net\.{prefix}$"):
        load_into(network(), state, "weights.pt", parameter="classifier_prefix", prefix="net.")


def test_every_prefix_that_fits_is_offered() -> None:
    state = {f"{prefix}.{name}": tensor for prefix in ("model", "ema") for name, tensor in plain(network()).items()}
    with pytest.raises(UsageError, match=r"it fits with `unet_prefix` model\. or `unet_prefix` ema\.$"):
        load_into(network(), state, "weights.pt")


def test_module_is_left_as_it_was_by_an_error() -> None:
    module = network(8)
    before = {name: tensor.clone() for name, tensor in plain(module).items()}
    with pytest.raises(UsageError):
        load_into(module, plain(network(9)) | {"more": torch.zeros(1)}, "weights.pt")
    assert same(plain(module), before)


def test_checkpoint_named_pth_tar_is_one(tmp_path: Path) -> None:
    """As PyTorch's own ImageNet example names what torch.save writes."""
    torch.save({"a": torch.ones(2)}, tmp_path / "checkpoint.pth.tar")
    assert read_state_dict(tmp_path / "checkpoint.pth.tar")["a"].tolist() == [1, 1]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no checkpoint: it is empty: download or copy it again"),
        (b"<!DOCTYPE html><html>not found</html>", "no checkpoint: it is a web page.*: download the file itself"),
    ],
)
def test_download_that_brought_nothing_is_told(tmp_path: Path, kind: str, content: bytes, said: str) -> None:
    path = tmp_path / f"weights{kind}"
    path.write_bytes(content)
    with pytest.raises(CheckFailed, match=said):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ".pth.tar"])
def test_pointer_of_git_lfs_is_no_damaged_checkpoint(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4' * 64}\nsize 12345678\n")
    with pytest.raises(CheckFailed, match="is a pointer of Git LFS to 12,345,678 bytes.*git lfs pull"):
        read_state_dict(path)
