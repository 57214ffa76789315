"""PyTorch programs from outside: a function by its name, or a .pt2 file of torch.export.

`package.module:function` runs what it names, as importing always does. A .pt2 file runs nothing that it brings along:
`torch.export.load` (2.13) unpickles sample inputs and custom objects, loads native libraries, evaluates symbolic
expressions and executes guards, so an archive is read here first and refused for all of these.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import json
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densepure_rt import files
from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.runtime.transport import transfer_fault

# What torch.export.save of torch 2.9 and later writes into an archive for one program without custom objects, less the
# pickles: torch/export/pt2_archive/_package.py and constants.py.
RECORD = re.compile(
    r"models/model\.json|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json)|data/sample_inputs/model\.pt"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id|alignment)|\.format_version|extra/.+"
)
SAMPLE_INPUTS = "data/sample_inputs/model.pt"
NAME = re.compile(r"[\w.+-]*")  # no name of this shape can end or open anything in generated Python
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")  # of arguments and results
ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)")
# Operators that check what they read, by their names before the overload; the in-place ones too. They are what exports
# of image classifiers and UNets of torch.nn, diffusers and transformers hold, beside those that torch tags as core.
# Others trust their arguments: segment_reduce(unsafe=True) reads wherever its offsets say.
OPERATORS = set(
    "__and__ __or__ __xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_tensor_metadata _log_softmax "
    "_native_batch_norm_legit _native_batch_norm_legit_no_training _softmax _to_copy _unsafe_index _unsafe_view "
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact2d _weight_norm adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d addcdiv addcmul affine_grid_generator all "
    "alpha_dropout argsort baddbmm batch_norm broadcast_tensors broadcast_to celu channel_shuffle chunk clamp_max "
    "clamp_min clip concat contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "cosine_similarity cross cumprod detach div divide dot dropout einsum erfc exp2 expand_as eye feature_dropout "
    "flatten floor_divide glu grid_sampler group_norm hardshrink hardsigmoid hardswish im2col instance_norm isfinite "
    "layer_norm lerp lift_fresh_copy linalg_norm linalg_vector_norm linear linspace log_sigmoid log_softmax logsumexp "
    "masked_fill matmul max max_pool1d max_pool2d max_pool3d meshgrid min mish movedim multiply mT mv narrow new_full "
    "new_ones new_zeros norm numpy_T ones ones_like outer pad pixel_shuffle pixel_unshuffle prelu relu6 "
    "repeat_interleave reshape reshape_as rms_norm roll rsub scaled_dot_product_attention selu silu softmax softplus "
    "softshrink split square stack std std_mean subtract swapaxes t tensor_split tile to transpose tril triu "
    "true_divide type_as unbind unflatten unfold upsample_bicubic2d var var_mean view_as where zero zeros "
    "zeros_like".split()
)
# Core operators whose name begins otherwise than with an underscore, and that give memory as it was or as it is told.
RAW = set("as_strided empty empty_strided resize_".split())
SYMBOLIC = re.compile(r"torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt|pow)")
SCOPES = ("wrap_with_set_grad_enabled", "wrap_with_autocast")  # what `with torch.no_grad()` in a forward becomes
ARITHMETIC = set("add sub mul truediv floordiv mod neg pow eq ne lt le gt ge and_ or_ not_ getitem".split())
# The functions of symbolic sizes, sympy's and those of torch/utils/_sympy/functions.py.
EXPRESSIONS = set(
    "Symbol Integer Float Rational Add Mul Pow Max Min Mod And Or Not Eq Ne Lt Le Gt Ge Equality Unequality LessThan "
    "GreaterThan StrictLessThan StrictGreaterThan floor ceiling FloorDiv ModularIndexing Where PythonMod CleanDiv "
    "CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv IntTrueDiv "
    "IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat Identity".split()
)
SYMBOL_OR_NUMBER = re.compile(r"[A-Za-z_]\w*|[\d.]+(e[+-]?\d+)?")
GRAMMAR = (
    ast.Expression,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.Call,
    ast.keyword,
    ast.BinOp,
    ast.UnaryOp,
    ast.Compare,
    ast.BoolOp,
    ast.operator,
    ast.unaryop,
    ast.cmpop,
    ast.boolop,
)


def first_line(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def load_callable(name: str) -> Callable[..., Any]:
    """Import what `package.module:function` names, from the working directory only. This runs the module.

    Raises UsageError when there is no such module or name, when importing fails, or when it cannot be called.
    """
    module_name, _, path = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise UsageError(f"{name!r} is not package.module:function")
    here, top = str(Path.cwd()), module_name.partition(".")[0]
    importlib.invalidate_caches()
    there = PathFinder.find_spec(top, [here])
    if there is None:
        raise UsageError(
            f"{name}: no module {top!r} in {here}, and only the working directory is looked in: run in the folder that "
            f"holds it; what an installed package has can be imported in a module there"
        )
    if top in sys.modules and getattr(sys.modules[top].__spec__, "origin", None) != there.origin:
        raise UsageError(f"{name}: another module {top!r} is in use already: give the one in {here} a name of its own")
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module_name}.".startswith(f"{missing}."):
            raise UsageError(f"{name}: no module {missing!r} in {here}: check its name") from error
        raise UsageError(f"{name}: importing {module_name} ended in {first_line(error)}") from error
    finally:
        sys.path.remove(here)
    for part in path.split("."):
        if not hasattr(found, part):
            near = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")][:6]
            raise UsageError(f"{name}: {module_name} has no {path!r}; it has {', '.join(near) or 'nothing to call'}")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{name} is a {type(found).__name__}: name a function that returns the network")
    loaded: Callable[..., Any] = found
    return loaded


def built(name: str) -> nn.Module:
    """The network that `package.module:function` is, or returns when it is called without arguments."""
    function = load_callable(name)
    if isinstance(function, nn.Module):
        return function
    try:
        network = function()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name}() ended in {first_line(error)}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{name}() gives a {type(network).__name__}: it should return a torch.nn.Module")
    return network


class Program(nn.Module):
    """An exported program as a module whose mode is what it was exported in."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, *args: Any) -> Any:
        return self.program(*args)

    def train(self, mode: bool = True) -> Program:
        """Nothing: an exported graph has its mode built in, and would raise."""
        self.training = False
        return self


def exported_program(path: Path) -> nn.Module:
    """The program in a .pt2 file of `torch.export.save`, in the mode that it was exported in.

    Nothing in the file is run. Raises UsageError when it cannot be read or is no such file, CheckFailed when it holds
    more than a graph of PyTorch's own operators and plain weights.
    """
    try:
        content = files.content(path, "model")
    except OSError as error:
        raise UsageError(f"cannot read the program {path} ({error.strerror})") from error
    if fault := transfer_fault(path):
        raise CheckFailed(f"{path} is no program: {fault}")
    refuse_code(content, path.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecations inside torch
            program = torch.export.load(io.BytesIO(content))
            # The guards are Python source in the file: never executed.
            known = inspect.signature(program.module).parameters
            return Program(program.module(**{"check_guards": False} if "check_guards" in known else {}))
    except Exception as error:
        raise UsageError(
            f"torch {torch.__version__} cannot load {path} ({first_line(error)}): export it again with this version"
        ) from error


def refuse_code(content: bytes, name: str) -> None:
    """Raise CheckFailed for a .pt2 archive from which `torch.export.load` might run anything, UsageError for none."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.namelist()
            packed = [record.filename for record in archive.infolist() if record.compress_type != zipfile.ZIP_STORED]
    except Exception as error:  # what zipfile raises of a damaged file is not a closed list
        raise UsageError(f"{name} is not a program of torch.export.save ({error})") from error
    if "serialized_exported_program.json" in entries:
        raise UsageError(f"{name} has the format of torch 2.8 or older: load it there and save it with a newer one")
    if packed:  # of any size once it is unpacked
        raise CheckFailed(f"{name} is a compressed archive ({packed[0]}), which torch.export.save does not write")
    records = [entry.partition("/")[2] for entry in entries]
    for entry, record in zip(entries, records, strict=True):
        if not RECORD.fullmatch(record) or records.count(record) > 1:
            raise CheckFailed(_refused(name, f"holds {entry!r}"))
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(content))  # what torch.export.load reads with
        held = set(reader.get_all_records())
        texts = {record: reader.get_record(record) for record in sorted(held) if record.endswith(".json")}
        documents = {record: json.loads(text) for record, text in texts.items() if not record.startswith("extra/")}
        samples = reader.get_record(SAMPLE_INPUTS) if SAMPLE_INPUTS in held else b""
    except (RuntimeError, ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not a program of torch.export.save ({first_line(error)})") from error
    if not held <= set(records) or "models/model.json" not in held:
        raise UsageError(f"{name} is not a program of torch.export.save: it holds no models/model.json")
    if samples:
        try:
            torch.load(io.BytesIO(samples), weights_only=True)
        except Exception as error:  # what a damaged pickle raises is not a closed list
            raise CheckFailed(_refused(name, "has sample inputs that are a pickle of more than tensors")) from error
    for document in documents.values():
        for found in suspicious(document):
            raise CheckFailed(_refused(name, found))


def _refused(name: str, found: str) -> str:
    return (
        f"{name} {found}; loading that could run code from the file. It is read only as torch.export.save writes a "
        f"network of PyTorch's own operators: give package.module:function for any other, if you trust it"
    )


def suspicious(value: Any, key: str = "") -> Iterator[str]:
    """Find what is more than data in a JSON document of the archive, in words. key: under which `value` stands."""
    if isinstance(value, dict):
        if value.get("use_pickle"):
            yield f"has a pickled tensor in {value.get('path_name')!r}"
        if isinstance(value.get("target"), str) and not permitted(value["target"]):
            yield f"calls {value['target']!r}"
        for name, inner in value.items():
            if not NAME.fullmatch(name) and not (key == "range_constraints" and is_expression(name)):
                yield f"has the name {name[:60]!r}"
            if not unused(value, name, inner):
                yield from suspicious(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from suspicious(inner, key)
    elif isinstance(value, str):
        if key == "expr_str":
            plain = is_expression(value)
        elif key in ("in_spec", "out_spec"):
            plain = not value or is_container(value)
        else:
            plain = NAME.fullmatch(value) is not None
        if not plain:
            yield f"has {value[:60]!r} as {key}"


def unused(parent: dict[str, Any], name: str, value: Any) -> bool:
    """Return whether `value`, under `name` in `parent`, is text that may say anything: it is only shown or passed on.

    These are a node's or a graph's metadata, guards, which are not executed here, and operators' arguments, such as
    einsum's equation. A tensor may have any name, so a name alone says nothing.
    """
    texts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    place = {
        "metadata": isinstance(parent.get("target"), str) or {"graph", "signature"} <= set(parent),
        "guards_code": "graph_module" in parent,
        "as_string": len(parent) == 1,
        "as_strings": len(parent) == 1,
    }
    return place.get(name, False) and all(isinstance(text, str) for text in texts)


def permitted(target: object) -> bool:
    """Return whether a target is an operator of PyTorch that computes: none that reads files, or memory at will."""
    if not isinstance(target, str):
        return False
    if aten := ATEN.fullmatch(target):
        packet = getattr(torch.ops.aten, aten[1], None)
        operator = getattr(packet, aten[2], None)
        if not isinstance(operator, torch._ops.OpOverload) or any(a.is_out for a in operator._schema.arguments):
            return False
        return any(name in OPERATORS or is_core(name) for name in (aten[1], aten[1].removesuffix("_")))
    module, _, name = target.rpartition(".")
    return (
        SYMBOLIC.fullmatch(target) is not None
        or (module == "_operator" and name in ARITHMETIC)
        or (module == "torch.ops.higher_order" and name in SCOPES)
    )


def is_core(name: str) -> bool:
    """Return whether torch tags an operator of this name as core, and it checks what it reads."""
    if name.startswith("_") or name.endswith("_backward") or name in RAW:
        return False
    packet = getattr(torch.ops.aten, name, None)
    overloads = packet.overloads() if packet is not None else ()
    return any(torch.Tag.core in getattr(packet, overload).tags for overload in overloads)


def is_expression(text: str) -> bool:
    """Return whether a text is arithmetic of symbols: sympy evaluates what it is given."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, GRAMMAR):
            return False
        if isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id in EXPRESSIONS):
            return False
        if isinstance(node, ast.Constant) and not SYMBOL_OR_NUMBER.fullmatch(str(node.value)):
            return False  # sympy evaluates strings within too
    return True


def is_container(text: str) -> bool:
    """Return whether a text is a tree of tuples, lists and dictionaries in torch.utils._pytree's JSON."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False

    def plain(tree: Any) -> bool:
        if not isinstance(tree, dict) or set(tree) != {"type", "context", "children_spec"}:
            return False
        context = tree["context"]
        known = context is None or (isinstance(context, str) and re.fullmatch(r'null|\[[\w\s.",-]*\]', context))
        return tree["type"] in CONTAINERS and bool(known) and all(map(plain, tree["children_spec"]))

    return isinstance(document, list) and len(document) == 2 and document[0] == 1 and plain(document[1])
