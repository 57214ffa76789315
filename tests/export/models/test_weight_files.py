"""Which weights of a folder are taken, by the names that diffusers and transformers themselves write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.models.unets import diffusers_unet
from densepure_rt.export.models.weight_files import weight_file
from densepure_rt.runtime.bundle import sha256_of
from tests.support.diffusers_folder import small_unet

STEMS = {"safetensors": "model", "bin": "pytorch_model"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 12345678\n"


@pytest.mark.parametrize(
    ("names", "taken", "variant"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors", ""),
        (["model.fp16.safetensors", "pytorch_model.bin"], "pytorch_model.bin", ""),
        (["other.safetensors", "pytorch_model.bin"], "pytorch_model.bin", ""),
        (["model.fp16.safetensors"], "model.fp16.safetensors", "fp16"),
        (["pytorch_model.fp16.bin", "model.fp16.safetensors"], "model.fp16.safetensors", "fp16"),
        (["model.safetensors.index.fp16.json"], "model.safetensors.index.fp16.json", "fp16"),
        (["model-00001-of-00002.safetensors", "model.safetensors"], "model.safetensors", ""),
    ],
)
def test_weights_are_those_of_the_loader_s_names(tmp_path: Path, names: list[str], taken: str, variant: str) -> None:
    for name in names:
        (tmp_path / name).write_text('{"weight_map": {}}')
    found = weight_file(tmp_path, STEMS)
    assert (found.path.name, found.variant) == (taken, variant)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], r"holds no model.safetensors or pytorch_model.bin \(it holds nothing\)"),
        (["other.safetensors"], r"\(it holds other.safetensors\): download or copy that too"),
        (["model-00001-of-00002.safetensors"], "holds no model.safetensors"),
        (["model.fp16.safetensors", "model.ema.safetensors"], "variants alone, ema, fp16: leave one of them there"),
    ],
)
def test_folder_without_its_weights_is_told_what_it_holds(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"1")
    with pytest.raises(UsageError, match=said):
        weight_file(tmp_path, STEMS)


def test_every_file_of_an_index_is_looked_at(tmp_path: Path) -> None:
    index, part = tmp_path / "model.safetensors.index.json", tmp_path / "model-00001-of-00001.safetensors"
    index.write_text(json.dumps({"weight_map": {"a": part.name}}))
    with pytest.raises(UsageError, match=f"names {part.name}, which is not there"):
        weight_file(tmp_path, STEMS)
    part.write_bytes(POINTER)
    with pytest.raises(CheckFailed, match="pointer of Git LFS"):
        weight_file(tmp_path, STEMS)
    save_file({"a": torch.zeros(1)}, part)
    assert weight_file(tmp_path, STEMS).sha256() not in (sha256_of(index), sha256_of(part))
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(CheckFailed, match="outside its folder"):
        weight_file(tmp_path, STEMS)


@pytest.mark.parametrize("size", ["10GB", "20KB"])
def test_diffusers_folder_of_a_variant_alone_is_computed_in_float32(tmp_path: Path, size: str) -> None:
    network = small_unet(8, 1, (8, 8))
    schedule: Any = DDPMScheduler()
    network.half().save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    schedule.save_pretrained(tmp_path)
    found = diffusers_unet(tmp_path)
    (note,) = found.notes
    assert "is the only one there: its fp16 weights are computed with in float32" in note
    assert {parameter.dtype for parameter in found.network.parameters()} == {torch.float32}
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 3.0])
    torch.testing.assert_close(found.network(x, t), network.float().eval()(x, t).sample, rtol=1e-4, atol=1e-4)


def test_safetensors_of_something_else_do_not_hide_a_diffusers_pickle(tmp_path: Path) -> None:
    network = small_unet(8, 1, (8, 8))
    schedule: Any = DDPMScheduler()
    network.save_pretrained(tmp_path, safe_serialization=False)
    schedule.save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors")
    found = diffusers_unet(tmp_path)
    assert found.notes == ()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 3.0])
    torch.testing.assert_close(found.network(x, t), network.eval()(x, t).sample)
