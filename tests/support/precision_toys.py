"""A diffusion network and a classifier of a few thousand weights, with all that a change of precision must mind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepure_rt.export.models.classifiers import ClassifierModel
from densepure_rt.export.models.unets import DiffusionModel
from densepure_rt.runtime.schedule import Schedule

IMAGE = (1, 8, 8)


class Block(nn.Module):
    """A residual block with attention: group norm, convolution, functional attention and functional softmax."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, width), nn.Conv2d(width, width, 3, padding=1)
        self.qkv, self.temb = nn.Linear(width, 3 * width), nn.Linear(16, width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = x + self.conv(F.silu(self.norm(x))) + self.temb(temb)[:, :, None, None]
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens)[:, None].chunk(3, dim=3)  # one head
        tokens = tokens + F.scaled_dot_product_attention(q, k, v)[:, 0]
        tokens = tokens + (torch.softmax(q @ k.transpose(2, 3) / 4, dim=-1) @ v)[:, 0]
        output: Tensor = tokens.transpose(1, 2).reshape(x.shape)
        return output


class ToyUnet(nn.Module):
    """What a published UNet does around its precision: it casts its time embedding to the type of its weights."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv_in, self.conv_out = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)
        self.time_embedding = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.block = Block(8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        temb = self.time_embedding(torch.cat([angles.sin(), angles.cos()], 1).to(self.conv_in.weight.dtype))
        x = self.conv_in(x)
        return torch.tanh(self.conv_out(torch.cat([self.block(x, temb), x], 1))) + 0.1


class ToyClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).flatten(1))
        return logits


def diffusion(seed: int = 0) -> DiffusionModel:
    return DiffusionModel(
        ToyUnet(seed).eval(), IMAGE, Schedule("linear", 1000), "fixed_small", "epsilon", (-1.0, 1.0), "0" * 64
    )


def classifier() -> ClassifierModel:
    return ClassifierModel(ToyClassifier().eval(), IMAGE, ("a", "b", "c"), "1" * 64)
