"""The Open Inference Protocol (KServe v2, as Triton speaks it): requests in, responses out, as pure functions of bytes.

A body is JSON, or JSON followed by raw tensors (the binary tensor data extension): then the header
`Inference-Header-Content-Length` says where the JSON ends, and the tensors lie behind it in the order of the inputs,
little-endian, rows first. What comes in is untrusted: nothing is allocated by a size that a request only declares, and
whatever is wrong with it is a ProtocolError.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from densepure_rt.errors import UsageError
from densepure_rt.json_files import STRICT, strict

Datatype = Literal["UINT8", "INT64", "FP64", "BOOL", "BYTES"]
HEADER_LENGTH = "Inference-Header-Content-Length"
VERSION = "1"  # of every model
EXTENSIONS = ("binary_tensor_data",)
LITTLE_ENDIAN: Mapping[Datatype, str] = {"UINT8": "u1", "INT64": "<i8", "FP64": "<f8", "BOOL": "?"}
MOST_ID = 256  # characters of a request's id, which is sent back
SHOWN = 40  # characters of what was sent that an error repeats
KINDS = {dict: "an object", list: "a list", type(None): "nothing"}
S = TypeVar("S", bound="Sent")


class ProtocolError(UsageError):
    """A request that is not what the protocol or the model asks for."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model. shape: -1 for the images of a request."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A model as clients may ask it. most_images: in one request. about: what else its metadata says."""

    name: str
    input: Tensor
    outputs: tuple[Tensor, ...]
    most_images: int
    about: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class InferRequest:
    """images: uint8, of the model's shape. outputs: those asked for, by name, and whether as raw bytes.

    told: parameters of the response.
    """

    id: str | None
    images: NDArray[np.uint8]
    outputs: Mapping[str, bool]
    deadline_ms: float | None
    told: Mapping[str, Any] = field(default_factory=dict)


class Sent(BaseModel):
    """Describe an object of a request. Any: what is held against a model afterwards, and data, which may be long."""

    model_config = STRICT


class SentRequest(Sent):
    id: str | None = Field(None, max_length=MOST_ID, description=f"a string of {MOST_ID} characters at most")
    parameters: Any = {}
    inputs: list[Any] = Field(None, validate_default=True, description="a list")
    outputs: list[Any] = Field([], description="a list")


class SentInput(Sent):
    name: Any = None
    datatype: Any = None
    shape: Any = None
    data: Any = None
    parameters: Any = {}


class SentOutput(Sent):
    name: Any = None
    parameters: Any = {}


class RequestParameters(Sent):
    deadline_ms: float | None = Field(None, gt=0, description="a finite number of milliseconds above 0")
    binary_data_output: bool = Field(False, description="true or false")


class InputParameters(Sent):
    binary_data_size: int | None = Field(None, description="an integer")


class OutputParameters(Sent):
    binary_data: bool | None = Field(None, description="true or false")


def metadata(model: Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": "densepure-rt",
        "inputs": [described(model.input)],
        "outputs": [described(output) for output in model.outputs],
        "parameters": dict(model.about),
    }


def described(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


# requests


def parse_request(model: Model, body: bytes, header_length: str | None = None) -> InferRequest:
    """header_length: that header's value; None where there is none, and all of the body is JSON.

    Raises ProtocolError, and nothing else.
    """
    head, raw = split(body, header_length)
    request = checked(SentRequest, from_json(head), "the request")
    parameters = checked(RequestParameters, request.parameters, "parameters of the request")
    return InferRequest(
        id=request.id,
        images=image_of(model, request.inputs, raw),
        outputs=outputs_of(model, request.outputs, parameters.binary_data_output),
        deadline_ms=parameters.deadline_ms,
    )


def parse_address(model: Model, query: Mapping[str, str]) -> InferRequest:
    """Parse the address of a request whose body is a picture: ?name=, which is in the answer, and &deadline_ms=.

    Its images are none yet. Raises ProtocolError, and nothing else.
    """
    if unknown := sorted(set(query) - {"name", "deadline_ms"}):
        raise ProtocolError(f"the address has {shown(unknown[0])}, which is not known here: deadline_ms, name")
    if len(query.get("name", "")) > MOST_ID:
        raise ProtocolError(f"name is a string of {MOST_ID} characters at most, got {len(query['name'])}")
    given: dict[str, Any] = {name: value for name, value in query.items() if name == "deadline_ms"}
    with suppress(ValueError):
        given = {name: float(value) for name, value in given.items()}
    parameters = checked(RequestParameters, given, "the address")
    return InferRequest(
        id=None,
        images=np.empty((0, *model.input.shape[1:]), np.uint8),
        outputs=outputs_of(model, [], binary=False),
        deadline_ms=parameters.deadline_ms,
        told={"name": query["name"]} if "name" in query else {},
    )


def split(body: bytes, header_length: str | None) -> tuple[bytes, bytes]:
    """The JSON and the raw tensors of a body."""
    if header_length is None:
        return body, b""
    if not re.fullmatch("[0-9]{1,18}", header_length) or int(header_length) > len(body):
        raise ProtocolError(
            f"{HEADER_LENGTH} is the number of bytes of JSON at the start of a body of {len(body)}, "
            f"got {shown(header_length)}"
        )
    return body[: int(header_length)], body[int(header_length) :]


def from_json(text: bytes) -> Any:
    try:
        return strict(text)
    except ValueError as error:
        raise ProtocolError(f"the request is not JSON in UTF-8 ({error})") from error


def checked(kind: type[S], value: Any, what: str) -> S:
    """Check an object. Its nulls are dropped: clients write null for what was not set. what: its name in errors."""
    if not isinstance(value, dict):
        raise ProtocolError(f"{what} is a JSON object, got {kind_of(value)}")
    try:
        return kind.model_validate({name: member for name, member in value.items() if member is not None})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    if not fault["loc"]:  # a lone surrogate
        raise ProtocolError(f"{what} has a name that is no valid Unicode")
    name, found = str(fault["loc"][0]), fault["input"]
    if fault["type"] == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields))
        raise ProtocolError(f"{what} has {shown(name)}, which is not known here: {known}")
    raise ProtocolError(f"{what}: {name} is {kind.model_fields[name].description}, got {kind_of(found)}")


def image_of(model: Model, inputs: list[Any], raw: bytes) -> NDArray[np.uint8]:
    """The one input of a model: uint8, of its shape."""
    wanted = model.input
    if len(inputs) != 1:
        raise ProtocolError(f"{model.name} takes one input, {wanted.name}, got {len(inputs)}")
    given = checked(SentInput, inputs[0], "an input")
    if given.name != wanted.name:
        raise ProtocolError(f"the input of {model.name} is {wanted.name}, got {shown(given.name)}")
    if given.datatype != wanted.datatype:
        raise ProtocolError(f"{wanted.name} is {wanted.datatype}, got {shown(given.datatype)}")
    shape = shape_of(model, given.shape)
    size = checked(InputParameters, given.parameters, f"parameters of {wanted.name}").binary_data_size
    if size is None:
        if raw:
            raise ProtocolError(
                f"{len(raw)} bytes follow the JSON, and no input says that they are its: binary_data_size"
            )
        return from_numbers(given.data, shape, wanted.name)
    if given.data is not None:
        raise ProtocolError(f"{wanted.name} has both data and binary_data_size: give one")
    if not size == len(raw) == math.prod(shape):
        raise ProtocolError(
            f"{wanted.name} of shape {list(shape)} has {math.prod(shape)} bytes, its binary_data_size is {shown(size)} "
            f"and {len(raw)} bytes follow the JSON"
        )
    return np.frombuffer(raw, np.uint8).reshape(shape)


def shape_of(model: Model, given: Any) -> tuple[int, ...]:
    image = model.input.shape[1:]
    fits = (
        isinstance(given, list)
        and all(type(size) is int for size in given)
        and given[1:] == list(image)
        and 1 <= given[0] <= model.most_images
    )
    if not fits:
        most = "1 image" if model.most_images == 1 else f"1 to {model.most_images} images"
        raise ProtocolError(
            f"{model.input.name} is {most} of {list(image)} (channels, height, width), got the shape {shown(given)}"
        )
    return tuple(given)


def from_numbers(data: Any, shape: tuple[int, ...], name: str) -> NDArray[np.uint8]:
    """An array from numbers in lists of this shape, or in one flat list."""
    values = data if is_flat(data) else flattened(data, shape, name)
    if len(values) != math.prod(shape):
        raise ProtocolError(f"{name} of shape {list(shape)} has {math.prod(shape)} values, got {len(values)}")
    for value in values:
        if type(value) is not int or not 0 <= value <= 255:
            raise ProtocolError(f"{name} is UINT8, integers from 0 to 255, got {shown(value)}")
    return np.array(values, np.uint8).reshape(shape)


def is_flat(data: Any) -> bool:
    return isinstance(data, list) and not (data and isinstance(data[0], list))


def flattened(data: Any, shape: tuple[int, ...], name: str) -> list[Any]:
    level = [data]
    for size in shape:
        for values in level:
            if not isinstance(values, list) or len(values) != size:
                found = f"a list of {len(values)}" if isinstance(values, list) else kind_of(values)
                raise ProtocolError(
                    f"data of {name} is in lists as its shape {list(shape)} says, got {found} for {size}"
                )
        level = list(chain.from_iterable(level))
    return level


def outputs_of(model: Model, asked: list[Any], binary: bool) -> dict[str, bool]:
    """The outputs that are asked for, all where none are named, and whether each goes as raw bytes."""
    names = [output.name for output in model.outputs]
    if not asked:
        return dict.fromkeys(names, binary)
    found: dict[str, bool] = {}
    for each in asked:
        output = checked(SentOutput, each, "an output")
        if output.name not in names:
            raise ProtocolError(f"{model.name} has no output {shown(output.name)}: {', '.join(names)}")
        if output.name in found:
            raise ProtocolError(f"the output {output.name} is asked for twice")
        own = checked(OutputParameters, output.parameters, f"parameters of {output.name}").binary_data
        found[output.name] = binary if own is None else own
    return found


def kind_of(value: Any) -> str:
    """Name what was found in place of an object or a list."""
    return KINDS.get(type(value)) or shown(value)


def shown(value: Any) -> str:
    """A value as an error repeats it: in ASCII, on one line, and short."""
    text = kind_of(value) if isinstance(value, dict | list) and len(value) > SHOWN else ascii(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# responses


def encode_response(
    model: Model, request: InferRequest, values: Mapping[str, NDArray[Any] | Sequence[str]]
) -> tuple[bytes, dict[str, str]]:
    """A body and its headers. values: of each output, an array, or of BYTES strings."""
    tensors = [tensor for tensor in model.outputs if tensor.name in request.outputs]
    raw = {
        tensor.name: to_bytes(tensor.datatype, values[tensor.name])
        for tensor in tensors
        if request.outputs[tensor.name]
    }
    outputs = [encoded(tensor, values[tensor.name], raw.get(tensor.name)) for tensor in tensors]
    response: dict[str, Any] = {"model_name": model.name, "model_version": VERSION, "outputs": outputs}
    if request.told:
        response["parameters"] = dict(request.told)
    if request.id is not None:
        response["id"] = request.id
    head = json.dumps(response, allow_nan=False).encode("ascii")
    if not raw:
        return head, {"Content-Type": "application/json"}
    body = b"".join((head, *raw.values()))
    return body, {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def encoded(tensor: Tensor, values: NDArray[Any] | Sequence[str], raw: bytes | None) -> dict[str, Any]:
    shape = list(np.shape(values))
    output: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": shape}
    if raw is not None:
        return output | {"parameters": {"binary_data_size": len(raw)}}
    return output | {"data": values.ravel().tolist() if isinstance(values, np.ndarray) else list(values)}


def to_bytes(datatype: Datatype, values: NDArray[Any] | Sequence[str]) -> bytes:
    """Raw values, rows first; each of BYTES behind its length, four bytes."""
    if datatype == "BYTES":
        return b"".join(prefixed(str(value).encode("utf-8")) for value in values)
    return np.ascontiguousarray(values, LITTLE_ENDIAN[datatype]).tobytes()


def prefixed(value: bytes) -> bytes:
    return len(value).to_bytes(4, "little") + value


def encode_error(message: str) -> bytes:
    return json.dumps({"error": message}).encode("ascii")
