"""A PyTorch network in a smaller type: its convolutions and matrix products, but not norms, softmax and time embedding.

See `precision` for what each type is, and `lowering` for the same done to an ONNX graph.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from densepure_rt.errors import UsageError
from densepure_rt.export.convert.precision import TIME_EMBEDDING

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms of every dimension
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
NORM_FUNCTIONS = {
    F.batch_norm,
    F.instance_norm,
    F.group_norm,
    F.layer_norm,
    F.rms_norm,
    F.local_response_norm,
    F.normalize,
}
FLOAT32_FUNCTIONS = NORM_FUNCTIONS | {
    torch.batch_norm,
    torch.instance_norm,
    torch.group_norm,
    torch.layer_norm,
    F.softmax,
    F.log_softmax,
    torch.softmax,
    torch.log_softmax,
    Tensor.softmax,
    Tensor.log_softmax,
    F.multi_head_attention_forward,
}
PRODUCTS = {
    F.linear,
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
    torch.matmul,
    torch.bmm,
    torch.mm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
    Tensor.mm,
    Tensor.baddbmm,
    torch.cat,
    torch.stack,
}
CONVERSIONS = {Tensor.to, Tensor.type, Tensor.half, Tensor.bfloat16, Tensor.type_as}


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every floating tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_map(item, change) for item in value)
    if isinstance(value, dict):
        return {name: _map(item, change) for name, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Policy(TorchFunctionMode):
    """Which type each function computes in, whatever type its arguments come in.

    Products: the smaller type, as soon as one argument has it. Norms and softmax: float32, their result in the type of
    what came in. A network's own conversions to the smaller type do nothing: where precision falls is decided here.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attention(*args, **kwargs)
        if func in FLOAT32_FUNCTIONS:
            came = args[0].dtype
            result = func(*_map(args, Tensor.float), **_map(kwargs, Tensor.float))
            return result if came != self.dtype else _map(result, lambda x: x.to(came))
        if func in PRODUCTS and any(x.dtype == self.dtype for x in _tensors((args, kwargs))):
            return func(*_map(args, self.lowered), **_map(kwargs, self.lowered))
        result = func(*args, **kwargs)
        if func in CONVERSIONS and args[0].is_floating_point() and result.dtype == self.dtype:
            return args[0]
        return result

    def lowered(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Products in the smaller type around a softmax in float32; what is more than plain attention, all float32."""
        if self.dtype not in (query.dtype, key.dtype, value.dtype):
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None or is_causal or enable_gqa or dropout_p:
            mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
            found = F.scaled_dot_product_attention(
                query.float(),
                key.float(),
                value.float(),
                mask,
                dropout_p,
                is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
            return self.lowered(found)
        root = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        scores = self.lowered(query * root) @ self.lowered(key * root).transpose(-2, -1)
        return self.lowered(scores.float().softmax(-1)) @ self.lowered(value)


class Lowered(nn.Module):
    """A network whose convolutions and matrix products run in `dtype`; arguments and results are float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype

    def forward(self, *args: Tensor) -> Tensor:
        with _Policy(self.dtype):
            output: Tensor = self.network(*args)
        return output.float()


def matching(network: nn.Module, patterns: Iterable[str]) -> list[str]:
    """The modules whose name matches one of the shell patterns, in the network's own naming, * crossing dots."""
    patterns = list(patterns)
    return [name for name, _ in network.named_modules() if name and any(fnmatchcase(name, p) for p in patterns)]


def cast(network: nn.Module, dtype: torch.dtype, keep: Sequence[str] = ()) -> nn.Module:
    """A copy of `network`, in evaluation mode, that computes in `dtype` and takes and gives float32.

    What stays float32: norms, softmax, the modules that TIME_EMBEDDING names, and those that match a pattern of `keep`,
    each with all below it. Their output is float32 too, up to the next convolution or matrix product.

    Raises UsageError when a pattern matches no module.
    """
    for pattern in keep:
        if not matching(network, [pattern]):
            raise UsageError(f"`keep` {pattern} matches no module: the names are like {names_like(network)}")
    network = copy.deepcopy(network).eval()
    roots = matching(network, (*TIME_EMBEDDING, *keep))
    kept = {m for name in roots for m in network.get_submodule(name).modules()}
    kept |= {m for m in network.modules() if isinstance(m, NORMS)}
    for module in network.modules():
        if module not in kept:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    module._buffers[name] = buffer.to(dtype)
    for name in roots:
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs: (_map(args, Tensor.float), _map(kwargs, Tensor.float)), with_kwargs=True
        )
    return Lowered(network, dtype).eval()


def names_like(network: nn.Module, count: int = 6) -> str:
    names = [
        name for name, module in network.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    return ", ".join(names[:: max(1, len(names) // count)][:count]) or "(none)"
