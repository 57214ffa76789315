"""An ONNX file from anywhere, read and checked: nothing outside its folder is opened, and nothing in it is run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from densepure_rt import files
from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.export.models.onnx_graph import nodes_of
from densepure_rt.export.models.programs import first_line
from densepure_rt.runtime.bundle import sha256_of
from densepure_rt.runtime.transport import transfer_fault

LARGEST_ONNX = (1 << 31) - 1  # bytes of one protobuf message
WEIGHTS_NO_INPUTS = 4  # the first IR version in which an initializer need not be an input (ONNX, docs/IR.md)
OWN_DOMAINS = ("", "ai.onnx")  # one and the same (ONNX, docs/IR.md)


def read_onnx(path: Path) -> tuple[onnx.ModelProto, str]:
    """Read a classifier as an ONNX model of standard operators, with external weights in it and `onnx_sha256`.

    Raises UsageError or CheckFailed; what came of a transfer is told from a model that is unsound.
    """
    try:
        model = _parsed(path)
        digest = onnx_sha256(path)
        load_weights(model, path)
        after = onnx_sha256(path)
    except OSError as error:
        raise UsageError(f"cannot read the classifier {path} ({error.strerror or error})") from error
    if digest != after:
        raise CheckFailed(f"{path} or its weights changed while they were read: try again once they are whole")
    for entry in (*model.opset_import, *nodes_of(model.graph)):
        entry.domain = "" if entry.domain in OWN_DOMAINS else entry.domain
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # onnx's errors share no base
        raise CheckFailed(f"{path} is not a sound ONNX file ({first_line(error)}): export it again") from error
    return prepared(model, path.name), digest


def _parsed(path: Path) -> onnx.ModelProto:
    if fault := transfer_fault(path):
        raise CheckFailed(f"{path} is no ONNX file: {fault}")
    try:
        return onnx.load_model_from_string(files.content(path, "model"))
    except OSError:
        raise
    except Exception as error:  # protobuf's errors, whichever protobuf is installed
        raise CheckFailed(
            f"{path} cannot be read as an ONNX file ({first_line(error)}): it is cut short or something else; download "
            f"or copy it again"
        ) from error


def tensors_of(message: Any) -> Iterator[onnx.TensorProto]:
    """Yield every tensor within a message of ONNX: weights, those of graphs within, and attributes of nodes."""
    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from tensors_of(inner)


def outside(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, dict[str, str]]]:
    """Yield the tensors that lie in other files, and where: their location, offset and length."""
    for tensor in tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor, {entry.key: entry.value for entry in tensor.external_data}


def data_file(path: Path, name: str) -> Path:
    """Find the file beside the graph at `path` that it calls `name`, behind any links.

    A graph may come from a stranger, and must not make its reader open files elsewhere. So the file must lie in the
    folder of the graph, or beside the graph itself where both are links, as in the cache of a model hub. A hard link is
    a file like any other: who can make one can read what it names.

    Raises UsageError where it is missing, CheckFailed where it is elsewhere or was not transferred.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckFailed(
            f"{path} keeps weights in {name!r}, outside its folder, which is not read: put the file beside it and save "
            f"the model again with that name"
        )
    file = path.parent / name
    try:
        real = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # a loop of links, in older Pythons
        found = "a link to a file that is not there" if file.is_symlink() else "not there"
        raise UsageError(
            f"{path} keeps its weights in {file}, which is {found}: download or copy it too, beside the graph and "
            f"under that name"
        ) from error
    if not (real.is_relative_to(path.parent.resolve()) or real.parent == path.resolve().parent):
        raise CheckFailed(
            f"{path} keeps its weights in {file}, a link to a file in another folder than the graph, which is not "
            f"followed: copy both files out of the cache or the folder of links into one folder (cp -L)"
        )
    if not real.is_file():
        raise CheckFailed(f"{path} keeps its weights in {file}, which is no file: copy the model again")
    if fault := transfer_fault(real):
        raise CheckFailed(f"{path} keeps its weights in {file}, but {fault}")
    return real


def load_weights(model: onnx.ModelProto, path: Path) -> None:
    """Put what lies in other files into the model itself. path: of the graph.

    Raises UsageError for more than one ONNX file can hold, CheckFailed for a file that ends too early; see `data_file`.
    """
    parts = []
    for tensor, where in outside(model):
        file = data_file(path, where.get("location", ""))
        size = file.stat().st_size
        try:
            offset = int(where.get("offset", 0))
            length = int(where.get("length", size - offset))
        except ValueError as error:
            raise CheckFailed(f"{path} does not say where {tensor.name!r} lies ({error}): export it again") from error
        if offset < 0 or length < 0 or offset + length > size:
            raise CheckFailed(
                f"{path} reads bytes {offset:,} to {offset + length:,} of {file.name}, which holds {size:,}: it is cut "
                f"short, or of another model; download or copy it again"
            )
        parts.append((tensor, file, offset, length))
    if model.ByteSize() + sum(length for *_, length in parts) > LARGEST_ONNX:
        raise UsageError(f"{path} with its weights is over 2 GB, which no single ONNX file holds: export it in fp16")
    for tensor, file, offset, length in parts:
        with files.opened(file, "model") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(length)
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def onnx_sha256(path: Path) -> str:
    """Hash an ONNX file, or it and the files of its external weights, wherever in it they are named."""
    model = onnx.load_model_from_string(files.content(path, "model"))
    names = sorted({where.get("location", "") for _, where in outside(model)})
    if not names:
        return sha256_of(path)
    digests = [sha256_of(file) for file in (path, *(data_file(path, name) for name in names))]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def prepared(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Copy a model: local functions inlined, weights no inputs, node names of their own.

    Raises CheckFailed for custom operators.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model, convert_version=True)
    ours = onnx.ModelProto()
    ours.CopyFrom(model)
    strange = sorted({node.domain for node in nodes_of(ours.graph)} - set(OWN_DOMAINS))
    if strange:
        ops = sorted({node.op_type for node in nodes_of(ours.graph) if node.domain in strange})
        raise CheckFailed(
            f"{name} uses {', '.join(ops)} of {', '.join(strange)}: only ONNX's own operators run everywhere; export "
            f"it without these"
        )
    versions = [entry.version for entry in ours.opset_import if entry.domain in OWN_DOMAINS]
    del ours.opset_import[:]
    ours.opset_import.append(onnx.helper.make_opsetid("", versions[0]))
    constants = {tensor.name for tensor in ours.graph.initializer}
    inputs = [value for value in ours.graph.input if value.name not in constants]
    del ours.graph.input[:]
    ours.graph.input.extend(inputs)
    raise_ir_version(ours)
    for proto in (ours, ours.graph):
        del proto.metadata_props[:]
        proto.ClearField("doc_string")
    del ours.training_info[:], ours.graph.quantization_annotation[:]  # of names that are about to change
    for node in nodes_of(ours.graph):
        node.ClearField("doc_string")  # older exporters of PyTorch leave the paths of sources there
        del node.metadata_props[:]
    rename_twins(ours)
    return ours


def raise_ir_version(model: onnx.ModelProto) -> None:
    """Bring the IR version up to what the model's opset and weights that are no inputs need."""
    needed = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    model.ir_version = max(model.ir_version, needed, WEIGHTS_NO_INPUTS)


def rename_twins(model: onnx.ModelProto) -> None:
    """Give nodes that share a name numbers behind it: onnx.checker allows them, ONNX Runtime does not."""
    nodes = list(nodes_of(model.graph))
    taken = {node.name for node in nodes}
    seen = {""}  # no name is a name that all may have
    for node in nodes:
        name, number = node.name, 1
        while node.name in seen and name:
            number += 1
            if (candidate := f"{name}_{number}") not in taken:
                node.name = candidate
        taken.add(node.name)
        seen.add(node.name)
