"""The UNets of improved-diffusion and guided-diffusion, with their architecture read off the checkpoint.

Modules bear the names of the public layout, so a strict load is the whole mapping. Layout and settings:
github.com/openai/guided-diffusion, guided_diffusion/unet.py and script_util.py; the equations are those of Nichol &
Dhariwal 2021, Dhariwal & Nichol 2021 and, for attention, Vaswani et al. 2017.

Four things leave no trace in the weights: the number of heads, the order in which heads and q, k, v are split, the
noise schedule and the image size. They are known for the published checkpoints. For others the order is the public
code's default (`use_new_attention_order` off) unless it is given, and the rest has to be given; `denoising.py` tries
the alternatives. Heads that differ on the way up (`num_heads_upsample`) are not supported.

This module is long because a network of the public layout reads best whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepure_rt.errors import UsageError
from densepure_rt.export.models.checkpoints import check_fit, load_into, missing, read_state_dict
from densepure_rt.export.models.unets import DiffusionModel, refuse_odd
from densepure_rt.runtime.bundle import MAX_STEPS, sha256_of
from densepure_rt.runtime.schedule import Schedule

Resampling = Literal["conv", "resblock", "pool"]
AttentionOrder = Literal["legacy", "new"]

GROUPS = 32  # of every group norm: guided_diffusion/nn.py, normalization
MAX_PERIOD = 10_000  # of the timestep embedding: the same, timestep_embedding; Vaswani et al. 2017, section 3.5
BLOCK = re.compile(r"(input|output)_blocks\.(\d{1,4})\.")


@dataclass(frozen=True)
class Architecture:
    """The architecture of a UNet as its weights tell it; levels from the finest to the coarsest.

    widths: channels of each level, the public `channel_mult` times model_channels. blocks: `num_res_blocks`, on the way
    down; one more on the way up. attention: which levels have it; the middle always has. resampling between levels:
    strided convolution and nearest + convolution ("conv"), residual blocks that pool and repeat ("resblock",
    `resblock_updown`), or the bare pooling and repeating ("pool", no `conv_resample`). scale_shift: the embedding
    scales and shifts the second norm (`use_scale_shift_norm`); otherwise it is added before it. learned_variance: the
    output has as many channels again (`learn_sigma`).
    """

    in_channels: int
    model_channels: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[bool, ...]
    resampling: Resampling
    scale_shift: bool
    learned_variance: bool

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels if self.learned_variance else self.in_channels

    @property
    def attended_widths(self) -> set[int]:
        return {self.widths[-1], *(w for w, attended in zip(self.widths, self.attention, strict=True) if attended)}


@dataclass(frozen=True)
class Heads:
    """The split of attention: a number of heads at every width, or a number of channels for every head.

    order: what the channels of qkv are split into first, see `attention`.
    """

    number: int | None = None
    channels: int | None = None
    order: AttentionOrder = "legacy"

    def at(self, width: int) -> int:
        """The number of heads at `width` channels. Raises UsageError where it does not come out even."""
        given = self.number if self.number is not None else self.channels
        if given is None or (self.number is not None and self.channels is not None):
            raise UsageError("`num_heads` and `num_head_channels` each say it all: give one of the two")
        if given < 1 or width % given:
            parameter = "num_heads" if self.number is not None else "num_head_channels"
            raise UsageError(f"`{parameter}` {given} does not divide the {width} channels of this UNet's attention")
        return given if self.number is not None else width // given

    def __str__(self) -> str:
        return f"{self.number} at every width" if self.channels is None else f"{self.channels} channels each"


def timestep_embedding(t: Tensor, width: int) -> Tensor:
    """cos and then sin of t * MAX_PERIOD^(-i / half), i < half = width // 2: t [B] -> [B, width], 0 in an odd last one.

    t is a float: networks are conditioned on fractions of timesteps.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=1)
    return F.pad(embedding, (0, 1)) if width % 2 else embedding


def attention(qkv: Tensor, heads: int, order: AttentionOrder = "legacy") -> Tensor:
    """softmax(q k / sqrt(c)) v over positions, heads apart: [B, heads * 3 * c, T] -> [B, heads * c, T].

    order: "legacy" splits the channels into heads first, then each head into q, k and v; "new" splits them into q, k
    and v first, then each of these into heads (`use_new_attention_order` of guided-diffusion). With one head they are
    the same. q and k each carry c^(-1/4), so that neither product overflows in float16 (guided_diffusion/unet.py,
    QKVAttentionLegacy and QKVAttention).
    """
    if order == "legacy":
        q, k, v = qkv.unflatten(1, (heads, -1)).chunk(3, dim=2)  # each [B, heads, c, T]
    else:
        q, k, v = (part.unflatten(1, (heads, -1)) for part in qkv.chunk(3, dim=1))
    root = q.shape[2] ** -0.25
    scores = (q * root).transpose(2, 3) @ (k * root)  # [B, heads, T, T], a row for each position that asks
    weights = torch.softmax(scores.float(), dim=3).to(v.dtype)
    mixed: Tensor = v @ weights.transpose(2, 3)
    return mixed.flatten(1, 2)


class Downsample(nn.Module):
    """Half the height and width, by a strided convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        halved: Tensor = self.op(x)
        return halved


class Upsample(nn.Module):
    """Twice the height and width: every pixel four times, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.repeat = repeated()

    def forward(self, x: Tensor) -> Tensor:
        doubled: Tensor = self.conv(self.repeat(x))
        return doubled


def pooled() -> nn.Module:
    return nn.AvgPool2d(2)


def repeated() -> nn.Module:
    return nn.Upsample(scale_factor=2.0, mode="nearest")


class ResBlock(nn.Module):
    """norm, SiLU, convolution, twice, the time embedding between them, around a skip connection.

    `resample` stands before the first convolution and in the skip connection.
    """

    def __init__(
        self, width_in: int, width: int, embedding: int, scale_shift: bool, resample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width_in), nn.SiLU(), nn.Conv2d(width_in, width, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * width if scale_shift else width))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
            nn.Identity(),  # dropout, in training
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.skip_connection = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)
        self.resample = resample or nn.Identity()
        self.scale_shift = scale_shift

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, width_in, H, W], emb [B, embedding] -> [B, width, H', W']."""
        norm, silu, conv = self.in_layers
        h = conv(self.resample(silu(norm(x))))
        emb = self.emb_layers(emb)[:, :, None, None]
        norm, silu, _, conv = self.out_layers
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + emb)
        output: Tensor = self.skip_connection(self.resample(x)) + conv(silu(h))
        return output


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a map, added to it."""

    def __init__(self, width: int, heads: int, order: AttentionOrder) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)
        self.heads, self.order = heads, order

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.proj_out(attention(self.qkv(self.norm(x).flatten(2)), self.heads, self.order))
        return x + attended.reshape(x.shape)


class Block(nn.Sequential):
    """Layers in sequence, of which residual blocks take the time embedding as well."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]  # Sequential's takes one input
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class OpenAIUNet(nn.Module):
    """(x [B, C, H, W], t [B], float) -> the predicted noise [B, C, H, W], with variance logits behind [B, 2C, H, W]."""

    def __init__(self, architecture: Architecture, heads: Heads) -> None:
        super().__init__()
        a = architecture
        embedding, last = 4 * a.model_channels, len(a.widths) - 1

        def residual(width_in: int, width: int, resample: nn.Module | None = None) -> nn.Module:
            return ResBlock(width_in, width, embedding, a.scale_shift, resample)

        def attend(width: int, attended: bool = True) -> list[nn.Module]:
            return [AttentionBlock(width, heads.at(width), heads.order)] if attended else []

        def down(width: int) -> nn.Module:
            if a.resampling == "conv":
                return Downsample(width)
            return residual(width, width, pooled()) if a.resampling == "resblock" else pooled()

        def up(width: int) -> nn.Module:
            if a.resampling == "conv":
                return Upsample(width)
            return residual(width, width, repeated()) if a.resampling == "resblock" else repeated()

        width = a.widths[0]
        inward, skipped = [Block(nn.Conv2d(a.in_channels, width, 3, padding=1))], [width]
        for level, (wanted, attended) in enumerate(zip(a.widths, a.attention, strict=True)):
            for _ in range(a.blocks):
                inward.append(Block(residual(width, wanted), *attend(wanted, attended)))
                width = wanted
                skipped.append(width)
            if level < last:
                inward.append(Block(down(width)))
                skipped.append(width)
        middle = Block(residual(width, width), *attend(width), residual(width, width))
        outward = []
        for level, (wanted, attended) in reversed(list(enumerate(zip(a.widths, a.attention, strict=True)))):
            for _ in range(a.blocks + 1):
                outward.append(Block(residual(width + skipped.pop(), wanted), *attend(wanted, attended)))
                width = wanted
            if level > 0:
                outward[-1].append(up(width))

        self.architecture, self.heads = architecture, heads
        self.time_embed = nn.Sequential(
            nn.Linear(a.model_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.input_blocks = nn.ModuleList(inward)
        self.middle_block = middle
        self.output_blocks = nn.ModuleList(outward)
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, a.out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time_embed(timestep_embedding(t, self.architecture.model_channels))
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        output: Tensor = self.out(x)
        return output


def unloaded(architecture: Architecture, heads: Heads) -> OpenAIUNet:
    """The UNet on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return OpenAIUNet(architecture, heads)


def resplit(network: OpenAIUNet, heads: Heads) -> OpenAIUNet:
    """Share the weights of a network with one whose attention is split in another way."""
    other = unloaded(network.architecture, heads)
    other.load_state_dict(network.state_dict(), assign=True)
    return other.eval()


def infer(
    state: Mapping[str, Tensor], what: str = "the state dict", parameter: str = "unet_prefix", prefix: str = ""
) -> Architecture:
    """The architecture that a flat state dict is of, every key and shape accounted for.

    what, parameter, prefix: as `load_into` takes them. Raises UsageError naming the first key that does not fit.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        if name not in state:
            raise missing(name, "which every UNet of OpenAI's layout has here", state, what, parameter, prefix)
        found = tuple(state[name].shape)
        if len(found) != dimensions or 0 in found:
            raise UsageError(
                f"{what} is no UNet of OpenAI's layout: {prefix}{name} should have {dimensions} dimensions, "
                f"found {list(found)}"
            )
        return found

    def refused(name: str, wanted: str, found: object) -> UsageError:
        return UsageError(f"{what} is no UNet of OpenAI's layout: {prefix}{name} should {wanted}, found {found}")

    if "label_emb.weight" in state:
        raise UsageError(
            f"{what} holds {prefix}label_emb.weight: this network is told the class of its image, and only "
            f"unconditional ones are supported: take such a one, 256x256_diffusion_uncond.pt for 256x256_diffusion.pt"
        )
    _, model_channels = shape("time_embed.0.weight", 2)
    if model_channels < 2:
        raise refused("time_embed.0.weight", "take 2 channels or more", model_channels)
    first_width, in_channels, *_ = shape("input_blocks.0.0.weight", 4)
    found = {(side, int(i)) for side, i in (match.groups() for match in map(BLOCK.match, state) if match)}
    count = sum(side == "output" for side, _ in found)
    for i in range(count):
        shape(f"output_blocks.{i}.0.in_layers.2.weight", 4)
    resampling, ends = _resampling(state, count, found)
    period = math.gcd(count, *ends)  # where one of the ends is missing, the others tell
    levels, blocks = (count // period, period - 1) if count else (0, 0)
    if blocks < 1:
        raise UsageError(
            f"{what} is no UNet of OpenAI's layout: {count} {prefix}output_blocks, and levels that end before "
            f"{prefix}input_blocks {ends or 'none'}, should make two output blocks or more on each level"
        )
    starts = [1 + period * level for level in range(levels)]
    widths = tuple(shape(f"input_blocks.{start}.0.out_layers.3.weight", 4)[0] for start in starts)
    for start, width in zip(starts, widths, strict=True):
        if width % GROUPS:
            raise refused(f"input_blocks.{start}.0.out_layers.3.weight", f"give a multiple of {GROUPS} channels", width)
    if first_width != widths[0]:
        raise refused("input_blocks.0.0.weight", f"give the first level's {widths[0]} channels", first_width)
    out_channels = shape("out.2.weight", 4)[0]
    if out_channels not in (in_channels, 2 * in_channels):
        raise refused("out.2.weight", f"give {in_channels} channels, or twice as many", out_channels)
    architecture = Architecture(
        in_channels=in_channels,
        model_channels=model_channels,
        widths=widths,
        blocks=blocks,
        attention=tuple(f"input_blocks.{start}.1.qkv.weight" in state for start in starts),
        resampling=resampling,
        scale_shift=shape("middle_block.0.emb_layers.1.weight", 2)[0] == 2 * widths[-1],
        learned_variance=out_channels == 2 * in_channels,
    )
    check_fit(unloaded(architecture, Heads(number=1)), state, what, parameter, prefix)
    return architecture


def _resampling(
    state: Mapping[str, Tensor], count: int, found: Collection[tuple[str, int]]
) -> tuple[Resampling, list[int]]:
    """Return how levels are joined, and which of the `count` input blocks end one.

    A strided convolution has its own name. A residual block that halves has none, but the one that doubles comes second
    or third in its output block. Bare pooling leaves a gap in the numbers. found: the blocks that have weights at all.
    """
    if convs := [i for i in range(count) if f"input_blocks.{i}.0.op.weight" in state]:
        return "conv", convs
    doubling = [i for i in range(count) if any(f"output_blocks.{i}.{j}.in_layers.2.weight" in state for j in (1, 2))]
    if doubling:
        return "resblock", [i + 1 for i in doubling]  # the levels are equally long: their ends are where the ups are
    gaps = [i for i in range(1, count) if ("input", i) not in found]
    return ("pool", gaps) if gaps else ("conv", [])  # of one level: nothing is resampled


def openai_schedule(name: str, steps: int, rescale_timesteps: bool = True) -> Schedule:
    """The schedule of `--schedule NAME --diffusion-steps STEPS` (gaussian_diffusion.py, get_named_beta_schedule).

    Linear betas are those of 1000 steps, shrunk so that any number of steps ends as noisy. rescale_timesteps: the
    network is told t * 1000 / steps, the default of improved-diffusion; in guided-diffusion it has to be asked for.
    """
    if name not in ("linear", "cosine"):
        raise UsageError(f"`schedule` {name} is not known for this layout: linear or cosine")
    least = 21 if name == "linear" else 2  # with fewer, the last linear beta is not below 1
    if not least <= steps <= MAX_STEPS:
        raise UsageError(f"`diffusion_steps` {steps}: a {name} schedule has from {least} to {MAX_STEPS}, mostly 1000")
    shrunk = 1000 / steps
    scale = shrunk if rescale_timesteps else 1.0
    if name == "cosine":
        return Schedule("cosine", steps, timestep_scale=scale)
    return Schedule("linear", steps, beta_start=shrunk * 1e-4, beta_end=shrunk * 0.02, timestep_scale=scale)


@dataclass(frozen=True)
class Published:
    """A checkpoint that is known by its architecture and its counts, not by the hash of its file.

    Others share the layout: the LSUN models of guided-diffusion, with the same settings, and whatever anybody trained.
    """

    name: str
    architecture: Architecture
    tensors: int
    parameters: int
    heads: Heads
    schedule: Schedule
    image_size: int


# Settings: the READMEs of improved-diffusion @1bc7bbb and guided-diffusion @22e0df8. Counts: the public code on the
# meta device; tests/export/models/test_openai_unet.py counts ours.
_of_colours = partial(Architecture, in_channels=3, scale_shift=True, learned_variance=True)
_CIFAR10 = _of_colours(
    model_channels=128, widths=(128, 256, 256, 256), blocks=3, attention=(False, True, True, False), resampling="conv"
)
_IMAGENET_256 = _of_colours(
    model_channels=256,
    widths=(256, 256, 512, 512, 1024, 1024),
    blocks=2,
    attention=(False, False, False, True, True, True),
    resampling="resblock",
)
_COSINE, _LINEAR = openai_schedule("cosine", 4000), openai_schedule("linear", 1000)
PUBLISHED = (  # counts are those of tensors and of parameters
    Published("cifar10_uncond_50M_500K.pt", _CIFAR10, 446, 52_546_438, Heads(number=4), _COSINE, 32),
    Published("256x256_diffusion_uncond.pt", _IMAGENET_256, 566, 552_814_086, Heads(channels=64), _LINEAR, 256),
)


def published(architecture: Architecture, state: Mapping[str, Tensor]) -> Published | None:
    """The published checkpoint whose fingerprint this is, if any."""
    fingerprint = architecture, len(state), sum(tensor.numel() for tensor in state.values())
    return next((p for p in PUBLISHED if (p.architecture, p.tensors, p.parameters) == fingerprint), None)


def openai_unet(
    path: Path,
    *,
    prefix: str = "",
    num_heads: int | None = None,
    num_head_channels: int | None = None,
    attention_order: AttentionOrder | None = None,
    schedule: Schedule | None = None,
    image_size: int | None = None,
) -> DiffusionModel:
    """The UNet of a checkpoint in OpenAI's layout, in float32 whatever type its weights are stored in.

    The published checkpoints need no settings; others need heads, schedule and image size. A network of a published
    one's layout that was trained otherwise needs all of them too. prefix: of the names to take, see `read_state_dict`.
    attention_order: None for "legacy", the order of every published checkpoint that is not told a class.
    Variance is learned where there are channels for it, else beta (script_util.py, create_gaussian_diffusion: its
    `sigma_small` is off).

    Raises CheckFailed for a damaged file, UsageError for one that does not fit or lacks settings.
    """
    state = read_state_dict(path, prefix)
    architecture = infer(state, str(path), prefix=prefix)
    given = num_heads is not None or num_head_channels is not None
    heads = Heads(num_heads, num_head_channels, attention_order or "legacy") if given else None
    heads, schedule, image_size = _settings(
        str(path), architecture, published(architecture, state), heads, attention_order, schedule, image_size
    )
    image = (architecture.in_channels, image_size, image_size)
    refuse_odd(image, len(architecture.widths) - 1)
    return DiffusionModel(
        network=load_into(unloaded(architecture, heads), state, str(path), prefix=prefix),
        image=image,
        schedule=schedule,
        variance="learned_range" if architecture.learned_variance else "fixed_large",
        prediction="epsilon",
        clip=(-1.0, 1.0),
        weights_sha256=sha256_of(path),
        attention=f"{heads}, {heads.order} order",
    )


def _settings(
    what: str,
    architecture: Architecture,
    known: Published | None,
    heads: Heads | None,
    order: AttentionOrder | None,
    schedule: Schedule | None,
    image_size: int | None,
) -> tuple[Heads, Schedule, int]:
    """Return what the weights do not tell: as given if complete, else as published where nothing given contradicts."""
    split = {width: heads.at(width) for width in architecture.attended_widths} if heads else {}
    if heads and schedule and image_size is not None:
        return heads, schedule, image_size
    if known is None:
        lacking = ["`num_heads` (or `num_head_channels`)"] if heads is None else []
        lacking += ["`schedule`", "`diffusion_steps`"] if schedule is None else []
        lacking += ["`image_size`"] if image_size is None else []
        raise UsageError(f"{what} is none of the published checkpoints: give {', '.join(lacking)}, as it was trained")
    contradictions = []
    if any(known.heads.at(width) != number for width, number in split.items()):
        contradictions.append(f"other heads than {known.heads}")
    if order not in (None, known.heads.order):
        contradictions.append(f"another attention order than {known.heads.order}")
    if schedule not in (None, known.schedule):
        trained = known.schedule
        contradictions.append(
            f"another schedule than {trained.name} of {trained.steps} steps told as t * {trained.timestep_scale:g}"
        )
    if image_size not in (None, known.image_size):
        contradictions.append(f"another image size than {known.image_size}")
    if contradictions:
        raise UsageError(
            f"{what} has the layout of {known.name}, and {' and '.join(contradictions)} was asked for: leave these "
            f"options out, or for another network of that layout give all of `num_heads` (or `num_head_channels`), "
            f"`schedule`, `diffusion_steps`, `image_size`"
        )
    return known.heads, known.schedule, known.image_size
