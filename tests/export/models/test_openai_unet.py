from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from densepure_rt.errors import DensePureError, UsageError
from densepure_rt.export.convert.casting import cast
from densepure_rt.export.convert.parity import noisy_states
from densepure_rt.export.convert.step_graph import StepGraph
from densepure_rt.export.convert.to_onnx import step_onnx
from densepure_rt.export.models.checkpoints import load_into, read_state_dict
from densepure_rt.export.models.openai_unet import (
    PUBLISHED,
    Architecture,
    Heads,
    OpenAIUNet,
    attention,
    infer,
    openai_schedule,
    openai_unet,
    published,
    resplit,
    timestep_embedding,
    unloaded,
)
from densepure_rt.export.models.reference import reverse_step
from densepure_rt.export.models.unets import DiffusionModel, refuse_odd
from densepure_rt.runtime.bundle import sha256_of
from densepure_rt.runtime.device import STEP_INPUTS, STEP_OUTPUTS
from densepure_rt.runtime.onnx_device import open_session
from densepure_rt.runtime.schedule import Coefficients, Schedule, make_chain

CIFAR, IMAGENET = PUBLISHED
TINY = Architecture(3, 32, (64, 96), 1, (False, True), "conv", True, True)
STATE = Mapping[str, Tensor]

# The widths of the 256x256 network divided by 4; its heads have 64 channels at every width there is attention.
NARROW = dataclasses.replace(IMAGENET.architecture, model_channels=64, widths=(64, 64, 128, 128, 256, 256))
VARIANTS = {
    "tiny": TINY,
    "added embedding, fixed variance": dataclasses.replace(TINY, scale_shift=False, learned_variance=False),
    "resblock": dataclasses.replace(TINY, resampling="resblock", widths=(64, 64, 96), attention=(True, False, True)),
    "pool": dataclasses.replace(
        TINY,
        widths=(64, 96, 96),
        blocks=2,
        attention=(False,) * 3,
        resampling="pool",
        scale_shift=False,
        learned_variance=False,
    ),
    "half a multiplier": dataclasses.replace(TINY, model_channels=128),
    "odd embedding": dataclasses.replace(TINY, model_channels=33),
    "one level": dataclasses.replace(TINY, widths=(64,), attention=(False,)),
    "grey": dataclasses.replace(TINY, in_channels=1),
    "narrowing, a group a channel": dataclasses.replace(TINY, widths=(96, 32)),
}


def random_state(architecture: Architecture, seed: int = 0) -> dict[str, Tensor]:
    """Every weight random, those that training starts at zero too: no block may be left out unnoticed."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in unloaded(architecture, Heads(number=1)).state_dict().items():
        values = torch.randn(tensor.shape, generator=draw)
        if tensor.dim() > 1:
            state[name] = values / math.sqrt(tensor[0].numel())
        else:
            is_norm_weight = name.endswith("weight")
            state[name] = values * 0.1 + float(is_norm_weight)
    return state


def loaded(architecture: Architecture, heads: Heads, state: STATE) -> OpenAIUNet:
    return load_into(unloaded(architecture, heads), state, "the test's weights")


def batch(channels: int, size: int, items: int = 2) -> tuple[Tensor, Tensor]:
    """t is a fraction, as CIFAR-10's network is told it, and a whole number of a thousand."""
    x = torch.randn(items, channels, size, size, generator=torch.Generator().manual_seed(7))
    return x, torch.tensor([289.75, 999.0, 0.0][:items])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# An independent reference: the published layout walked key by key, in float64, by plain tensor operations.


def group_norm(x: Tensor, state: STATE, name: str) -> Tensor:
    groups = x.reshape(x.shape[0], 32, -1)
    mean, variance = groups.mean(2, keepdim=True), groups.var(2, keepdim=True, unbiased=False)
    normal = ((groups - mean) / torch.sqrt(variance + 1e-5)).reshape(x.shape)
    shape = (1, -1, *(1,) * (x.dim() - 2))
    return normal * state[f"{name}.weight"].reshape(shape) + state[f"{name}.bias"].reshape(shape)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def conv(x: Tensor, state: STATE, name: str, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)


def linear(x: Tensor, state: STATE, name: str) -> Tensor:
    return torch.einsum("bi,oi->bo", x, state[f"{name}.weight"]) + state[f"{name}.bias"]


def halved(x: Tensor) -> Tensor:
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def residual(x: Tensor, emb: Tensor, state: STATE, name: str, resample: Callable[[Tensor], Tensor]) -> Tensor:
    h = conv(resample(silu(group_norm(x, state, f"{name}.in_layers.0"))), state, f"{name}.in_layers.2")
    shift = linear(silu(emb), state, f"{name}.emb_layers.1")[:, :, None, None]
    if shift.shape[1] == h.shape[1]:
        h = group_norm(h + shift, state, f"{name}.out_layers.0")
    else:
        width = h.shape[1]
        h = group_norm(h, state, f"{name}.out_layers.0") * (1 + shift[:, :width]) + shift[:, width:]
    h = conv(silu(h), state, f"{name}.out_layers.3")
    x = resample(x)
    return h + (conv(x, state, f"{name}.skip_connection") if f"{name}.skip_connection.weight" in state else x)


def attended(x: Tensor, state: STATE, name: str, heads: Heads) -> Tensor:
    items, width, height, across = x.shape
    tokens = group_norm(x, state, f"{name}.norm").reshape(items, width, height * across)
    qkv = torch.einsum("oi,bit->bot", state[f"{name}.qkv.weight"][:, :, 0], tokens) + state[f"{name}.qkv.bias"][:, None]
    count = heads.at(width)
    c, outputs = width // count, []
    for head in range(count):
        q, k, v = (qkv[:, (3 * head + part) * c : (3 * head + part + 1) * c] for part in range(3))
        scores = torch.einsum("bct,bcs->bts", q, k) / math.sqrt(c)
        weights = torch.exp(scores - scores.amax(2, keepdim=True))
        outputs.append(torch.einsum("bts,bcs->bct", weights / weights.sum(2, keepdim=True), v))
    output = torch.einsum("oi,bit->bot", state[f"{name}.proj_out.weight"][:, :, 0], torch.cat(outputs, 1))
    return x + (output + state[f"{name}.proj_out.bias"][:, None]).reshape(x.shape)


def parts(state: STATE, block: str) -> list[str]:
    """Names of what is in a block, in order."""
    return sorted({m[1] for m in (re.match(rf"({re.escape(block)}\.\d+)\.", name) for name in state) if m})


def by_the_layout(
    state: STATE, x: Tensor, t: Tensor, heads: Heads, ends: tuple[int, ...], style: str, blocks: int
) -> Tensor:
    """ends: the input blocks that halve the map. style: how. blocks: input and output blocks."""
    state = {name: tensor.double() for name, tensor in state.items()}
    x, width = x.double(), state["time_embed.0.weight"].shape[1]
    half = width // 2
    angles = [[float(time) * math.exp(-math.log(10000) * i / half) for i in range(half)] for time in t]
    embedding = [[math.cos(a) for a in row] + [math.sin(a) for a in row] + [0.0] * (width % 2) for row in angles]
    emb = linear(torch.tensor(embedding, dtype=torch.float64), state, "time_embed.0")
    emb = linear(silu(emb), state, "time_embed.2")

    def run(x: Tensor, block: str, end: Callable[[Tensor], Tensor] | None) -> Tensor:
        names = parts(state, block)
        for place, name in enumerate(names):
            if f"{name}.in_layers.0.weight" in state:
                resamples = end is not None and style == "resblock" and place == len(names) - 1
                x = residual(x, emb, state, name, end if resamples and end else lambda x: x)
            elif f"{name}.qkv.weight" in state:
                x = attended(x, state, name, heads)
            elif f"{name}.op.weight" in state:
                x = conv(x, state, f"{name}.op", stride=2)
            elif f"{name}.conv.weight" in state:
                x = conv(doubled(x), state, f"{name}.conv")
            else:
                x = conv(x, state, name)
        return end(x) if end is not None and style == "pool" else x

    skips = []
    for i in range(blocks):
        x = run(x, f"input_blocks.{i}", halved if i in ends else None)
        skips.append(x)
    x = run(x, "middle_block", None)
    for i in range(blocks):
        x = run(torch.cat([x, skips.pop()], 1), f"output_blocks.{i}", doubled if i + 1 in ends else None)
    return conv(silu(group_norm(x, state, "out.0")), state, "out.2")


def reference(architecture: Architecture, heads: Heads, state: STATE, x: Tensor, t: Tensor) -> Tensor:
    levels, period = len(architecture.widths), architecture.blocks + 1
    ends = tuple(period * level for level in range(1, levels))
    return by_the_layout(state, x, t, heads, ends, architecture.resampling, levels * period)


# What it computes


@pytest.fixture(scope="module")
def cifar() -> dict[str, Tensor]:
    return random_state(CIFAR.architecture)


@pytest.fixture(scope="module")
def narrow() -> dict[str, Tensor]:
    return random_state(NARROW)


def test_cifar10_network_in_full_is_the_published_layout(cifar: dict[str, Tensor]) -> None:
    x, t = batch(3, 32)
    with torch.no_grad():
        found = loaded(CIFAR.architecture, CIFAR.heads, cifar)(x, t)
        expected = by_the_layout(cifar, x, t, Heads(number=4), (4, 8, 12), "conv", 16)
    assert found.shape == (2, 6, 32, 32)
    error = relative(found, expected)
    print(f"relative L2 {error:.1e}")
    assert error <= 1e-5


def test_imagenet_network_a_quarter_as_wide_is_the_published_layout(narrow: dict[str, Tensor]) -> None:
    x, t = batch(3, 64)
    with torch.no_grad():
        found = loaded(NARROW, IMAGENET.heads, narrow)(x, t)
        expected = by_the_layout(narrow, x, t, Heads(channels=64), (3, 6, 9, 12, 15), "resblock", 18)
    assert found.shape == (2, 6, 64, 64)
    error = relative(found, expected)
    print(f"relative L2 {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_of_the_layout_is_computed(name: str) -> None:
    architecture = VARIANTS[name]
    state, (x, t) = random_state(architecture, 3), batch(architecture.in_channels, 16)
    with torch.no_grad():
        found = loaded(architecture, Heads(channels=16), state)(x, t)
        expected = reference(architecture, Heads(channels=16), state, x, t)
    assert found.shape[1] == architecture.out_channels
    assert relative(found, expected) <= 1e-5


def test_reference_would_notice(narrow: dict[str, Tensor]) -> None:
    """Heads, the order of q, k, v, the time and every tensor reach the output by more than the bound, by far."""
    x, t = batch(3, 32, items=1)
    with torch.no_grad():
        network = loaded(NARROW, IMAGENET.heads, narrow)
        found = network(x, t)
        assert relative(loaded(NARROW, Heads(channels=32), narrow)(x, t), found) > 1e-3
        assert relative(network(x, t + 1), found) > 1e-3
        tiny = random_state(TINY)
        x, t = batch(3, 8, items=1)
        found = loaded(TINY, Heads(number=2), tiny)(x, t)
        for name in tiny:
            other = tiny | {name: tiny[name].flip(0)}
            assert relative(loaded(TINY, Heads(number=2), other)(x, t), found) > 1e-4, name


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_orders_of_attention_are_the_two_layouts_of_their_channels(heads: int) -> None:
    """Each as the paper's equation over explicit heads, from the layout's axes: [head, part, c] and [part, head, c]."""
    qkv = torch.randn(2, heads * 3 * 5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for order, axes in (("legacy", "b h p c t -> p b h c t"), ("new", "b p h c t -> p b h c t")):
        sizes = (heads, 3) if order == "legacy" else (3, heads)
        source = axes.split(" -> ")[0].split()
        split = qkv.reshape(2, *sizes, 5, 7).permute([source.index(axis) for axis in "p b h c t".split()])
        q, k, v = split
        weights = torch.softmax(torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(5), dim=3)
        expected = torch.einsum("bhts,bhcs->bhct", weights, v).reshape(2, heads * 5, 7)
        found = attention(qkv, heads, "legacy" if order == "legacy" else "new")
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    same = torch.equal(attention(qkv, heads, "legacy"), attention(qkv, heads, "new"))
    assert same == (heads == 1)


def test_step_graph_of_the_new_order_is_exported_as_it_computes() -> None:
    heads = Heads(number=2, order="new")
    model = DiffusionModel(
        network=loaded(TINY, heads, random_state(TINY)).eval(),
        image=(3, 8, 8),
        schedule=Schedule("linear", 1000),
        variance="learned_range",
        prediction="epsilon",
        clip=(-1.0, 1.0),
        weights_sha256="0" * 64,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8)).astype(np.uint8)
    chain = make_chain(model.schedule, model.variance, 0.5, 1)
    x = torch.from_numpy(noisy_states(pixels, 0.5, chain.scale))
    feed = {"mean": x.numpy(), "std": np.zeros_like(x), "noise": np.zeros_like(x)}
    feed |= {"t": np.repeat(chain.t, 2), "coef": np.repeat(chain.coef, 2, axis=0)}
    session = open_session(step_onnx(model), "step", STEP_INPUTS, STEP_OUTPUTS)
    mean, *_ = session.run(STEP_OUTPUTS, feed)
    step, t = Coefficients(*chain.coef[0].tolist()), torch.full((2,), float(chain.t[0]))
    expected, _ = reverse_step(model, x, t, step)
    assert relative(torch.from_numpy(mean), expected) <= 1e-5
    legacy = dataclasses.replace(model, network=resplit(loaded(TINY, heads, random_state(TINY)), Heads(number=2)))
    assert relative(reverse_step(legacy, x, t, step)[0], expected) > 1e-4


def diffusers_twin(architecture: Architecture, head_channels: int, size: int) -> nn.Module:
    """diffusers' own UNet of the same architecture, without its weights."""
    resnets = architecture.resampling == "resblock"
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnets else ("DownBlock2D", "UpBlock2D")
    with_attention = ("AttnDownBlock2D", "AttnUpBlock2D")
    downs, ups = (
        tuple(pair[side] for pair in [with_attention if a else plain for a in architecture.attention])
        for side in (0, 1)
    )
    twin: nn.Module = UNet2DModel(  # type: ignore[assignment]  # diffusers' types lose the base class
        sample_size=size,
        in_channels=architecture.in_channels,
        out_channels=architecture.out_channels,
        layers_per_block=architecture.blocks,
        block_out_channels=architecture.widths,
        down_block_types=downs,
        up_block_types=ups[::-1],
        downsample_type="resnet" if resnets else "conv",
        upsample_type="resnet" if resnets else "conv",
        attention_head_dim=head_channels,
        norm_num_groups=32,
        attn_norm_num_groups=32,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift",
        flip_sin_to_cos=True,
        freq_shift=0,
    )
    return twin.eval()


RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def diffusers_names(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """Pairs of modules: the public layout's, diffusers'."""
    yield from (("time_embed.0", "time_embedding.linear_1"), ("time_embed.2", "time_embedding.linear_2"))
    yield from (("input_blocks.0.0", "conv_in"), ("out.0", "conv_norm_out"), ("out.2", "conv_out"))
    levels, period = len(architecture.widths), architecture.blocks + 1
    resnets = architecture.resampling == "resblock"
    blocks = [("middle_block.0", "mid_block.resnets.0"), ("middle_block.2", "mid_block.resnets.1")]
    attentions = [("middle_block.1", "mid_block.attentions.0")]
    for level, has_attention in enumerate(architecture.attention):
        up = levels - 1 - level
        for i in range(period):
            ours, theirs = f"input_blocks.{1 + period * level + i}", f"down_blocks.{level}"
            if i < architecture.blocks:
                blocks.append((f"{ours}.0", f"{theirs}.resnets.{i}"))
                attentions += [(f"{ours}.1", f"{theirs}.attentions.{i}")] if has_attention else []
            elif level < levels - 1:
                if resnets:
                    blocks.append((f"{ours}.0", f"{theirs}.downsamplers.0"))
                else:
                    yield f"{ours}.0.op", f"{theirs}.downsamplers.0.conv"
            ours, theirs = f"output_blocks.{period * up + i}", f"up_blocks.{up}"
            blocks.append((f"{ours}.0", f"{theirs}.resnets.{i}"))
            attentions += [(f"{ours}.1", f"{theirs}.attentions.{i}")] if has_attention else []
            if i == architecture.blocks and level > 0:
                place = 2 if has_attention else 1
                if resnets:
                    blocks.append((f"{ours}.{place}", f"{theirs}.upsamplers.0"))
                else:
                    yield f"{ours}.{place}.conv", f"{theirs}.upsamplers.0.conv"
    for ours, theirs in blocks:
        yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in RESNET.items())
    for ours, theirs in attentions:
        yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in {"norm": "group_norm", "proj_out": "to_out.0"}.items())
        yield f"{ours}.qkv", f"{theirs}.to_"


def diffusers_state(state: STATE, architecture: Architecture, head_channels: int) -> dict[str, Tensor]:
    found = {}
    for ours, theirs in diffusers_names(architecture):
        for kind in ("weight", "bias"):
            if (tensor := state.get(f"{ours}.{kind}")) is None:
                assert ours.endswith("skip_connection")
                continue
            if ours.endswith("qkv"):
                parts = tensor.reshape(-1, 3, head_channels, *tensor.shape[1:2])
                for i, part in enumerate("qkv"):
                    found[f"{theirs}{part}.{kind}"] = parts[:, i].flatten(0, 1)
            else:
                found[f"{theirs}.{kind}"] = (
                    tensor[:, :, 0] if ours.endswith("proj_out") and kind == "weight" else tensor
                )
    return found


@pytest.mark.parametrize("name", ["cifar", "narrow"])
def test_diffusers_unet_with_the_same_weights_gives_the_same(name: str, request: pytest.FixtureRequest) -> None:
    state: dict[str, Tensor] = request.getfixturevalue(name)
    architecture = CIFAR.architecture if name == "cifar" else NARROW
    size = 32 if name == "cifar" else 64
    with torch.device("meta"):
        twin = diffusers_twin(architecture, 64, size)
    twin.load_state_dict(diffusers_state(state, architecture, 64), strict=True, assign=True)
    x, t = batch(3, size)
    with torch.no_grad():
        found = loaded(architecture, Heads(channels=64), state)(x, t)
        (expected,) = twin(x, t, return_dict=False)
    error = relative(found, expected)
    print(f"relative L2 {error:.1e}")
    assert error <= 1e-5


def test_embedding_is_cosines_and_then_sines_of_fractional_times() -> None:
    t = torch.tensor([0.0, 289.75, 999.0])
    found = timestep_embedding(t, 6)
    angles = np.outer(t.double().numpy(), 10000.0 ** -(np.arange(3) / 3))
    np.testing.assert_allclose(found, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=2e-5)
    assert timestep_embedding(t, 7)[:, 6].tolist() == [0, 0, 0]


@settings(max_examples=20, deadline=None)
@given(heads=st.sampled_from([1, 2, 4]), positions=st.integers(1, 9), seed=st.integers(0, 9))
def test_attention_is_that_of_torch_on_heads_split_first(heads: int, positions: int, seed: int) -> None:
    qkv = torch.randn(2, heads * 3 * 4, positions, generator=torch.Generator().manual_seed(seed))
    q, k, v = (qkv.reshape(2, heads, 3, 4, positions)[:, :, i].transpose(2, 3) for i in range(3))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(2, heads * 4, positions)
    torch.testing.assert_close(attention(qkv, heads), expected)


def test_network_is_deterministic_and_items_do_not_meet() -> None:
    network = loaded(TINY, Heads(number=2), random_state(TINY))
    x, t = batch(3, 16, items=3)
    with torch.no_grad():
        together = network(x, t)
        assert torch.equal(network(x, t), together)
        for i in range(3):
            torch.testing.assert_close(network(x[i : i + 1], t[i : i + 1])[0], together[i], rtol=1e-4, atol=1e-5)


# Reading the architecture off the weights


@pytest.mark.parametrize("known", PUBLISHED, ids=[known.name for known in PUBLISHED])
def test_published_layouts_have_the_published_counts(known: Any) -> None:
    state = unloaded(known.architecture, known.heads).state_dict()
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == (known.tensors, known.parameters)
    assert infer(state) == known.architecture
    refuse_odd((3, known.image_size, known.image_size), len(known.architecture.widths) - 1)
    assert published(known.architecture, state) is known


def test_published_counts_are_those_of_the_public_code() -> None:
    """facts: instantiating the public code on the meta device."""
    assert (CIFAR.tensors, CIFAR.parameters) == (446, 52_546_438)
    assert (IMAGENET.tensors, IMAGENET.parameters) == (566, 552_814_086)


def test_published_schedules_are_those_of_the_public_code() -> None:
    assert CIFAR.schedule == Schedule("cosine", 4000, timestep_scale=0.25)
    assert IMAGENET.schedule == Schedule("linear", 1000)
    chain = make_chain(CIFAR.schedule, "learned_range", 0.25, 1)
    assert chain.t.tolist() == [chain.timesteps[0] / 4]


@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_linear_schedule_of_any_length_is_the_public_one(steps: int) -> None:
    scale = 1000 / steps
    betas = np.linspace(scale * 0.0001, scale * 0.02, steps, dtype=np.float64)
    schedule = openai_schedule("linear", steps)
    np.testing.assert_allclose(schedule.alpha_bar(), np.cumprod(1 - betas), rtol=1e-12)
    assert schedule.timestep_scale == scale
    assert openai_schedule("linear", steps, rescale_timesteps=False).timestep_scale == 1


@pytest.mark.parametrize(("name", "steps"), [("linear", 20), ("linear", 0), ("cosine", -1), ("cosine", 10**9)])
def test_schedule_of_an_impossible_length_is_refused(name: str, steps: int) -> None:
    with pytest.raises(UsageError, match=rf"`diffusion_steps` {steps}: a {name} schedule has from"):
        openai_schedule(name, steps)


def test_schedule_that_is_not_known_is_refused() -> None:
    with pytest.raises(UsageError, match="`schedule` sigmoid is not known for this layout: linear or cosine"):
        openai_schedule("sigmoid", 1000)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_inferred_from_its_weights(name: str) -> None:
    assert infer(random_state(VARIANTS[name])) == VARIANTS[name]


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    levels = draw(st.integers(1, 3))
    widths = tuple(32 * draw(st.integers(1, 4)) for _ in range(levels))
    return Architecture(
        in_channels=draw(st.integers(1, 4)),
        model_channels=draw(st.integers(2, 70)),
        widths=widths,
        blocks=draw(st.integers(1, 3)),
        attention=tuple(draw(st.booleans()) for _ in range(levels)),
        resampling=draw(st.sampled_from(["conv", "resblock", "pool"])) if levels > 1 else "conv",
        scale_shift=draw(st.booleans()),
        learned_variance=draw(st.booleans()),
    )


@settings(max_examples=30, deadline=None)
@given(architecture=architectures())
def test_any_architecture_is_inferred_from_its_weights(architecture: Architecture) -> None:
    assert infer(unloaded(architecture, Heads(number=1)).state_dict()) == architecture


@settings(max_examples=40, deadline=None)
@given(architecture=architectures(), draw=st.randoms(use_true_random=False))
def test_one_key_less_or_more_or_of_another_shape_is_named(architecture: Architecture, draw: Any) -> None:
    """A missing key is named, or, where the whole structure rests on it, another that is missing without it."""
    state = unloaded(architecture, Heads(number=1)).state_dict()
    name = draw.choice(list(state))
    kind = draw.choice(["missing", "shape", "more"])
    if kind == "missing":
        del state[name]
    elif kind == "shape":
        state[name] = torch.empty(*state[name].shape, 1, device="meta")
    else:
        name = f"{name.rsplit('.', 1)[0]}.more"
        state[name] = torch.empty(1, device="meta")
    with pytest.raises(UsageError) as caught:
        infer(state, "weights.pt")
    assert str(caught.value).startswith("weights.pt ")
    assert re.search(r"(time_embed|input_blocks|middle_block|output_blocks|out\.)", str(caught.value))
    assert kind == "missing" or name in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "time_embed.0.weight",
        "input_blocks.0.0.weight",
        "input_blocks.4.0.op.weight",
        "input_blocks.6.0.out_layers.3.weight",
        "input_blocks.6.1.proj_out.bias",
        "middle_block.1.norm.weight",
        "middle_block.0.emb_layers.1.weight",
        "output_blocks.3.1.conv.weight",
        "output_blocks.15.0.skip_connection.weight",
        "output_blocks.15.0.in_layers.2.weight",
        "out.2.bias",
    ],
)
def test_missing_key_of_the_cifar10_network_is_named(name: str) -> None:
    state = unloaded(CIFAR.architecture, CIFAR.heads).state_dict()
    del state[name]
    with pytest.raises(UsageError, match=rf"weights\.pt has no {re.escape(name)}, .*its names are like"):
        infer(state, "weights.pt")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("input_blocks.5.0.in_layers.2.weight", (256, 100, 3, 3), r"should be \[256, 128, 3, 3\], found \[256, 100"),
        ("out.2.weight", (5, 128, 3, 3), "should give 3 channels, or twice as many, found 5"),
        ("input_blocks.1.0.out_layers.3.weight", (100, 100, 3, 3), "should give a multiple of 32 channels, found 100"),
        ("input_blocks.0.0.weight", (64, 3, 3, 3), "should give the first level's 128 channels, found 64"),
        ("time_embed.0.weight", (512,), r"should have 2 dimensions, found \[512\]"),
        ("time_embed.2.weight", (512, 128), r"should be \[512, 512\], found \[512, 128\]"),
    ],
)
def test_wrong_shape_of_the_cifar10_network_is_named(name: str, shape: tuple[int, ...], words: str) -> None:
    state = unloaded(CIFAR.architecture, CIFAR.heads).state_dict() | {name: torch.empty(shape, device="meta")}
    with pytest.raises(UsageError, match=rf"weights\.pt .*{re.escape(name)} {words}"):
        infer(state, "weights.pt")


def test_key_too_many_is_named() -> None:
    state = unloaded(TINY, Heads(number=1)).state_dict()
    with pytest.raises(UsageError, match=r"has no output_blocks\.0\.0\.extra"):
        infer(state | {"output_blocks.0.0.extra": torch.empty(1)})
    with pytest.raises(UsageError, match=r"has no output_blocks\.4\.0\.in_layers\.2\.weight"):
        infer(state | {"output_blocks.5.0.extra": torch.empty(1)})


def test_class_conditional_network_is_refused_with_the_one_to_take() -> None:
    state = unloaded(IMAGENET.architecture, IMAGENET.heads).state_dict()
    state["label_emb.weight"] = torch.empty(1000, 1024, device="meta")
    with pytest.raises(
        UsageError, match=r"holds label_emb\.weight: .*only unconditional ones.*256x256_diffusion_uncond\.pt"
    ):
        infer(state)


@pytest.mark.parametrize("state", [{}, {"conv1.weight": torch.zeros(1)}, {"fc.weight": torch.zeros(2, 2)}])
def test_weights_of_something_else_are_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(UsageError, match=r"weights\.pt has no time_embed\.0\.weight, which every UNet"):
        infer(state, "weights.pt")


# From the file to the model


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "ema.pt"
    torch.save(random_state(TINY), path)
    return path


SETTINGS: dict[str, Any] = {"num_heads": 2, "schedule": Schedule("linear", 1000), "image_size": 16}


def test_published_network_needs_no_settings(tmp_path: Path, cifar: dict[str, Tensor]) -> None:
    path = tmp_path / "renamed.pt"
    torch.save(cifar, path)
    model = openai_unet(path)
    assert (model.image, model.schedule) == ((3, 32, 32), Schedule("cosine", 4000, timestep_scale=0.25))
    assert (model.variance, model.prediction, model.clip) == ("learned_range", "epsilon", (-1.0, 1.0))
    assert model.weights_sha256 == sha256_of(path)
    assert not model.network.training
    x, t = batch(3, 32, items=1)
    with torch.no_grad():
        assert torch.equal(model.network(x, t), loaded(CIFAR.architecture, Heads(number=4), cifar)(x, t))
    same = openai_unet(path, num_head_channels=64, image_size=32)  # all its attention is 256 wide
    assert (same.schedule, same.image) == (model.schedule, model.image)
    with pytest.raises(UsageError) as caught:
        openai_unet(path, num_heads=8, schedule=Schedule("linear", 1000))
    for words in (
        "the layout of cifar10_uncond_50M_500K.pt",
        "other heads than 4 at every width and another schedule than cosine of 4000 steps",
        "leave these options out",
        "give all of `num_heads`",
    ):
        assert words in str(caught.value)
    with pytest.raises(UsageError, match="another image size than 32"):
        openai_unet(path, image_size=64)
    with pytest.raises(UsageError, match="another attention order than legacy"):
        openai_unet(path, attention_order="new")
    other = openai_unet(path, num_heads=8, schedule=Schedule("linear", 1000), image_size=64)
    assert (other.schedule, other.image) == (Schedule("linear", 1000), (3, 64, 64))


def test_order_of_attention_is_that_of_published_networks_unless_given(tiny_file: Path) -> None:
    new = openai_unet(tiny_file, **SETTINGS, attention_order="new")
    legacy = openai_unet(tiny_file, **SETTINGS)
    x, t = batch(3, 16)
    with torch.no_grad():
        assert relative(new.network(x, t), legacy.network(x, t)) > 1e-4
    assert (new.attention, legacy.attention) == ("2 at every width, new order", "2 at every width, legacy order")
    assert all(known.heads.order == "legacy" for known in PUBLISHED)
    with pytest.raises(UsageError, match="`num_heads`"):
        openai_unet(tiny_file, attention_order="new")


@pytest.mark.parametrize("given_", ["", "num_heads", "num_head_channels", "schedule", "image_size"])
def test_other_networks_need_settings_and_all_that_lack_are_named(tiny_file: Path, given_: str) -> None:
    every = SETTINGS | {"num_head_channels": 32}
    with pytest.raises(UsageError, match="is none of the published checkpoints: give ") as caught:
        openai_unet(tiny_file, **({given_: every[given_]} if given_ else {}))
    message = str(caught.value)
    assert ("`num_heads` (or `num_head_channels`)" in message) == (not given_.startswith("num"))
    assert ("`schedule`, `diffusion_steps`" in message) == (given_ != "schedule")
    assert ("`image_size`" in message) == (given_ != "image_size")


def test_other_network_with_all_settings_is_read(tiny_file: Path) -> None:
    model = openai_unet(tiny_file, **SETTINGS)
    assert (model.image, model.schedule, model.variance) == ((3, 16, 16), Schedule("linear", 1000), "learned_range")
    x, t = batch(3, 16)
    with torch.no_grad():
        expected = reference(TINY, Heads(number=2), random_state(TINY), x, t)
        assert relative(model.network(x, t), expected) <= 1e-5


def test_fixed_variance_is_the_public_default(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(random_state(VARIANTS["added embedding, fixed variance"]), path)
    assert openai_unet(path, **SETTINGS).variance == "fixed_large"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 5}, "`num_heads` 5 does not divide the 96 channels"),
        ({"num_heads": 0}, "`num_heads` 0 does not divide"),
        ({"num_heads": None, "num_head_channels": 40}, "`num_head_channels` 40 does not divide the 96 channels"),
        ({"num_head_channels": 32}, "give one of the two"),
        ({"image_size": 15}, "`image_size` 15x15: .*multiples of 2"),
        ({"image_size": 0}, "`image_size` 0x0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tiny_file: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        openai_unet(tiny_file, **(SETTINGS | change))


@pytest.mark.parametrize("prefix", ["module.", "ema.model."])
def test_prefix_is_offered_and_works(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save({prefix + name: tensor for name, tensor in random_state(TINY).items()}, path)
    with pytest.raises(UsageError, match=rf"the name is there under a prefix; it fits with `unet_prefix` {prefix}$"):
        openai_unet(path, **SETTINGS)
    assert isinstance(openai_unet(path, prefix=prefix, **SETTINGS).network, OpenAIUNet)


def test_half_precision_weights_are_computed_in_float32(tmp_path: Path) -> None:
    """A mix of types, as training with use_fp16 leaves it."""
    state = random_state(TINY)
    mixed = {name: tensor.half() if "blocks" in name else tensor for name, tensor in state.items()}
    torch.save(mixed, tmp_path / "fp16.pt")
    network = openai_unet(tmp_path / "fp16.pt", **SETTINGS).network
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    x, t = batch(3, 16)
    with torch.no_grad():
        expected = reference(TINY, Heads(number=2), mixed, x, t)
        assert relative(network(x, t), expected) <= 1e-5


@settings(max_examples=60, deadline=None)
@given(draw=st.randoms(use_true_random=False), cut=st.booleans())
def test_damaged_file_is_a_clear_error_or_the_network_it_was(
    tiny_file: Path, tmp_path_factory: pytest.TempPathFactory, draw: Any, cut: bool
) -> None:
    content = bytearray(tiny_file.read_bytes())
    for _ in range(draw.randrange(1, 4)):
        near = draw.choice((2048, len(content)))
        content[-1 - draw.randrange(near)] ^= 1 << draw.randrange(8)  # the directory is at the end
    if cut:
        del content[draw.randrange(len(content)) :]
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content)
    try:
        model = openai_unet(path, **SETTINGS)
    except DensePureError as error:
        message = str(error)
    else:
        message = ""
        expected = random_state(TINY)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.network.state_dict().items())
    assert not message or str(path) in message


# Export and precision


def runs(content: bytes, feed: dict[str, Any]) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return list(session.run(["mean_next", "std_next", "finite"], feed))


def step_agrees(model: Any, items: int) -> float:
    """The worst relative L2 of what the exported step graph gives at this batch, against PyTorch."""
    content = step_onnx(model)
    assert [(entry.domain, entry.version) for entry in onnx.load_model_from_string(content).opset_import] == [("", 20)]
    chain = make_chain(model.schedule, model.variance, 0.5, 3)
    draw, worst = np.random.default_rng(0), 0.0
    for n in range(1, items + 1, 2):
        mean, noise = draw.standard_normal((2, n, *model.image), np.float32)
        steps = np.arange(n) % 3
        arrays = (mean, np.abs(mean[::-1]) / 3, noise, chain.t[steps], chain.coef[steps])
        with torch.no_grad():
            graph = StepGraph(model.network, model.clip, model.variance == "learned_range")
            expected = graph(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
        found = runs(content, dict(zip(("mean", "std", "noise", "t", "coef"), arrays, strict=True)))
        assert found[2].tolist() == [1.0] * n
        for ours, theirs in zip(found[:2], expected, strict=False):
            worst = max(worst, relative(torch.from_numpy(ours), theirs))
    print(f"relative L2 {worst:.1e}")
    return worst


@pytest.mark.parametrize("name", ["tiny", "resblock"])
def test_exported_step_agrees_with_pytorch(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save(random_state(VARIANTS[name]), path)
    assert step_agrees(openai_unet(path, **SETTINGS), items=3) <= 1e-5


@pytest.mark.slow
def test_exported_cifar10_network_agrees_with_pytorch(tmp_path: Path, cifar: dict[str, Tensor]) -> None:
    path = tmp_path / "weights.pt"
    torch.save(cifar, path)
    assert step_agrees(openai_unet(path), items=3) <= 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 5e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("name", ["tiny", "resblock"])
def test_lower_precision_leaves_the_time_embedding_alone(name: str, dtype: torch.dtype, bound: float) -> None:
    architecture = VARIANTS[name]
    network = loaded(architecture, Heads(number=2), random_state(architecture))
    lower = cast(network, dtype)
    kinds = {name.removeprefix("network."): parameter.dtype for name, parameter in lower.named_parameters()}
    assert {kind for name, kind in kinds.items() if name.startswith("time_embed.")} == {torch.float32}
    assert kinds["input_blocks.0.0.weight"] == kinds["middle_block.1.qkv.weight"] == kinds["out.2.weight"] == dtype
    assert kinds["middle_block.1.norm.weight"] == kinds["out.0.weight"] == torch.float32
    x, t = batch(3, 16)
    with torch.no_grad():
        found, expected = lower(x, t), network(x, t)
    assert found.dtype == torch.float32
    assert 0 < relative(found, expected) < bound


def test_weights_stay_mapped_until_they_are_used(tiny_file: Path) -> None:
    state = read_state_dict(tiny_file)
    network = loaded(TINY, Heads(number=2), state)
    assert all(tensor.data_ptr() == state[name].data_ptr() for name, tensor in network.state_dict().items())
