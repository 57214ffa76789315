"""Requests as tritonclient makes them, damaged ones, and any bytes at all; responses as tritonclient reads them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tritonclient.http import InferenceServerClient as Client
from tritonclient.http import InferInput, InferRequestedOutput, InferResult

from densepure_rt.serving.protocol import (
    HEADER_LENGTH,
    InferRequest,
    Model,
    ProtocolError,
    Tensor,
    encode_response,
    metadata,
    parse_request,
)

SHAPE = (3, 2, 5)
OUTPUTS = (
    Tensor("label", "INT64", (-1,)),
    Tensor("radius", "FP64", (-1,)),
    Tensor("abstain", "BOOL", (-1,)),
    Tensor("votes", "INT64", (-1, 4)),
    Tensor("outcome", "BYTES", (-1,)),
)
MODEL = Model("certify", Tensor("image", "UINT8", (-1, *SHAPE)), OUTPUTS, most_images=3, about={"sigma": 0.25})
ALL = [output.name for output in OUTPUTS]
IMAGES = np.arange(2 * 30, dtype=np.uint8).reshape(2, *SHAPE)


def by_tritonclient(
    images: NDArray[np.uint8], binary: bool, outputs: list[InferRequestedOutput] | None = None, **options: Any
) -> tuple[bytes, str | None]:
    """A body and its header length, made by another implementation."""
    tensor = InferInput("image", list(images.shape), "UINT8")
    tensor.set_data_from_numpy(images, binary_data=binary)
    body, length = Client.generate_request_body([tensor], outputs=outputs, **options)
    return body, None if length is None else str(length)


def request(**changes: Any) -> dict[str, Any]:
    """A right request in JSON, with these changes to its input."""
    image = {"name": "image", "datatype": "UINT8", "shape": [1, *SHAPE], "data": IMAGES[0].ravel().tolist()}
    return {"inputs": [image | changes]}


def refused(body: object, *words: str, header_length: str | None = None) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ProtocolError) as raised:
        parse_request(MODEL, sent, header_length)
    for word in words:
        assert word in str(raised.value)


# requests


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_what_tritonclient_sends_is_read(binary: bool, count: int) -> None:
    body, length = by_tritonclient(IMAGES[:count], binary, request_id="a", parameters={"deadline_ms": 250})
    assert (length is not None) == binary
    found = parse_request(MODEL, body, length)
    assert found.images.dtype == np.uint8
    np.testing.assert_array_equal(found.images, IMAGES[:count])
    assert (found.id, found.deadline_ms) == ("a", 250.0)
    assert found.outputs == dict.fromkeys(ALL, True)  # it asks for binary outputs when it names none


def test_each_output_says_whether_it_goes_as_raw_bytes() -> None:
    outputs = [InferRequestedOutput("radius", binary_data=False), InferRequestedOutput("label", binary_data=True)]
    body, length = by_tritonclient(IMAGES, True, outputs)
    assert parse_request(MODEL, body, length).outputs == {"radius": False, "label": True}


def test_a_request_in_json_gets_json() -> None:
    found = parse_request(MODEL, json.dumps(request()).encode())
    assert found.outputs == dict.fromkeys(ALL, False)
    assert (found.id, found.deadline_ms) == (None, None)


NULLS: list[tuple[dict[str, Any], dict[str, Any]]] = [  # of the request, and of its input
    ({"id": None}, {}),
    ({"parameters": None}, {}),
    ({"outputs": None}, {}),
    ({"parameters": {"deadline_ms": None, "binary_data_output": None}}, {}),
    ({}, {"parameters": None}),
    ({"id": None, "parameters": None, "outputs": None}, {"parameters": None}),
]


@pytest.mark.parametrize(("of_request", "of_input"), NULLS)
@pytest.mark.parametrize("binary", [False, True])
def test_null_says_of_an_optional_member_that_it_is_absent(
    of_request: dict[str, Any], of_input: dict[str, Any], binary: bool
) -> None:
    parameters = {"binary_data_size": 30} if binary else None
    given = {"data": None} if binary else {"parameters": {"binary_data_size": None}}
    body = request(**{"parameters": parameters} | given | (of_input if not binary else {})) | of_request
    head = json.dumps(body).encode()
    assert b"null" in head
    raw, length = (IMAGES[0].tobytes(), str(len(head))) if binary else (b"", None)
    found = parse_request(MODEL, head + raw, length)
    assert (found.id, found.deadline_ms, found.outputs) == (None, None, dict.fromkeys(ALL, False))
    np.testing.assert_array_equal(found.images[0], IMAGES[0])


def test_null_says_of_an_outputs_parameters_that_they_are_absent() -> None:
    asked = [{"name": "label", "parameters": None}, {"name": "radius", "parameters": {"binary_data": None}}]
    found = parse_request(MODEL, json.dumps(request() | {"outputs": asked}).encode())
    assert found.outputs == {"label": False, "radius": False}


@pytest.mark.parametrize("nested", [False, True])
def test_numbers_come_flat_or_in_lists_as_the_shape_says(nested: bool) -> None:
    data = IMAGES.tolist() if nested else IMAGES.ravel().tolist()
    found = parse_request(MODEL, json.dumps(request(shape=[2, *SHAPE], data=data)).encode())
    np.testing.assert_array_equal(found.images, IMAGES)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", ["not JSON"]),
        (b"\xff{}", ["UTF-8"]),
        (b"\xef\xbb\xbf{}", ["not JSON"]),
        (b"[" * 100_000, ["deeply"]),
        (b'{"a":' * 100_000, ["deeply"]),
        (b"1" * 10_000, ["not JSON"]),
        (b'{"inputs": NaN}', ["NaN is no number"]),
        (b'{"inputs": [], "inputs": []}', ["twice", "inputs"]),
        ([], ["the request is a JSON object", "a list"]),
        ({}, ["inputs is a list", "nothing"]),
        ({"inputs": {}}, ["inputs is a list"]),
        ({"inputs": []}, ["takes one input", "got 0"]),
        ({"inputs": request()["inputs"] * 2}, ["takes one input", "got 2"]),
        ({"inputs": [1]}, ["an input is a JSON object"]),
        (request() | {"inputz": 1}, ["inputz", "not known"]),
        (request() | {"id": 5}, ["id", "a string"]),
        (request() | {"id": "x" * 257}, ["256"]),
        (request() | {"id": "\ud800"}, ["id", "a string"]),
        (request() | {"\ud800": 1}, ["the request", "no valid Unicode"]),
        (request() | {"parameters": {"timeout": 5}}, ["timeout", "deadline_ms"]),
        (request() | {"parameters": {"deadline_ms": 0}}, ["above 0"]),
        (request() | {"parameters": {"deadline_ms": 10**400}}, ["deadline_ms", "finite"]),
        (request() | {"parameters": {"deadline_ms": True}}, ["above 0"]),
        (request() | {"parameters": {"deadline_ms": "1s"}}, ["above 0"]),
        (request() | {"parameters": {"binary_data_output": 1}}, ["true or false"]),
        (request() | {"outputs": [{"name": "logits"}]}, ["no output", "label, radius"]),
        (request() | {"outputs": [{"name": ["label"]}]}, ["no output", "label, radius"]),
        (request() | {"outputs": [{"name": "label"}, {"name": "label"}]}, ["label", "twice"]),
        (request() | {"outputs": [{"name": "label", "parameters": {"classification": 3}}]}, ["classification"]),
        (request() | {"outputs": ["label"]}, ["an output is a JSON object"]),
        (request(name="x"), ["image", "'x'"]),
        (request(name=None), ["image", "None"]),
        (request(datatype="FP32"), ["UINT8", "FP32"]),
        (request(shape=[1, 3, 5, 2]), ["[3, 2, 5]", "[1, 3, 5, 2]"]),
        (request(shape=list(SHAPE)), ["1 to 3 images"]),
        (request(shape=[0, *SHAPE]), ["1 to 3 images"]),
        (request(shape=[4, *SHAPE]), ["1 to 3 images"]),
        (request(shape=[2**62, *SHAPE]), ["1 to 3 images"]),
        (request(shape=[-1, *SHAPE]), ["1 to 3 images"]),
        (request(shape=[True, *SHAPE]), ["1 to 3 images"]),
        (request(shape=[1.0, *SHAPE]), ["1 to 3 images"]),
        (request(shape="1,3,2,5"), ["1 to 3 images"]),
        (request(data=[0] * 29), ["30 values, got 29"]),
        (request(data=[0] * 31), ["30 values, got 31"]),
        (request(data=[]), ["30 values, got 0"]),
        (request(data=None), ["lists", "nothing"]),
        (request(data=IMAGES[:1, :2].tolist()), ["a list of 2 for 3"]),
        (request(data=[[[[0] * 5, 1]] * 3]), ["lists as its shape"]),
        (request(data=[256] * 30), ["0 to 255", "256"]),
        (request(data=[-1] * 30), ["0 to 255", "-1"]),
        (request(data=[1.0] * 30), ["0 to 255", "1.0"]),
        (request(data=[True] * 30), ["0 to 255", "True"]),
        (request(data=["0"] * 30), ["0 to 255"]),
        (request(data=[10**400] * 30), ["0 to 255", "..."]),
        (request(parameters={"binary_data_size": 30}), ["both data and binary_data_size"]),
        (request(parameters={"shared_memory_region": "a"}), ["shared_memory_region"]),
        (request(parameters=[]), ["parameters of image is a JSON object"]),
    ],
)
def test_what_is_not_a_request_is_refused_in_words(body: object, words: list[str]) -> None:
    refused(body, *words)


@pytest.mark.parametrize(
    ("size", "sent", "length", "words"),
    [
        (30, 29, None, ["30 bytes", "29 bytes follow"]),
        (30, 31, None, ["30 bytes", "31 bytes follow"]),
        (2**60, 30, None, ["30 bytes", "1152921504606846976"]),
        (-1, 30, None, ["30 bytes", "-1"]),
        (True, 30, None, ["an integer"]),
        (None, 30, None, ["30 bytes follow the JSON"]),
        (30, 30, "-1", [HEADER_LENGTH]),
        (30, 30, "1e3", [HEADER_LENGTH]),
        (30, 30, "9" * 18, [HEADER_LENGTH]),
        (30, 30, "9" * 5000, [HEADER_LENGTH]),
        (30, 30, "٣", [HEADER_LENGTH]),
        (30, 30, "0", ["not JSON"]),
    ],
)
def test_raw_bytes_are_as_many_as_shape_and_size_say(
    size: int | None, sent: int, length: str | None, words: list[str]
) -> None:
    image = request()["inputs"][0]
    if size is not None:
        del image["data"]
        image["parameters"] = {"binary_data_size": size}
    head = json.dumps({"inputs": [image]}).encode()
    refused(head + b"\0" * sent, *words, header_length=str(len(head)) if length is None else length)


def tried(body: bytes, length: str | None) -> None:
    """A request, or a ProtocolError of one line; never anything else."""
    said, found = "", None
    try:
        found = parse_request(MODEL, body, length)
    except ProtocolError as error:
        said = str(error)
    if found is None:
        assert said.isprintable()
        assert 0 < len(said) < 600
    else:
        assert found.images.dtype == np.uint8
        assert found.images.shape[1:] == SHAPE
        assert set(found.outputs) <= set(ALL)


LENGTHS = st.none() | st.integers(-3, 400).map(str) | st.text(max_size=5)


@settings(deadline=None, max_examples=500)
@given(st.binary(max_size=200), LENGTHS)
def test_any_bytes_are_a_request_or_an_error_in_words(body: bytes, length: str | None) -> None:
    tried(body, length)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner))


@st.composite
def nearly_right(draw: st.DrawFn) -> dict[str, Any]:
    """A right request in which up to three values, wherever they stand, are others or missing."""
    body: dict[str, Any] = {
        "id": "a",
        "parameters": {"deadline_ms": 5, "binary_data_output": True},
        "inputs": [request()["inputs"][0] | {"parameters": {}}],
        "outputs": [{"name": "label", "parameters": {"binary_data": True}}],
    }
    for _ in range(draw(st.integers(0, 3))):
        place: Any = body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.booleans()):
                place = place[key]
                continue
            if draw(st.booleans()):
                del place[key]
            else:
                place[key] = draw(JSON)
            break
    return body


@settings(deadline=None, max_examples=500)
@given(nearly_right(), st.binary(max_size=40), st.booleans())
def test_a_request_that_is_nearly_right_is_a_request_or_an_error_in_words(
    body: dict[str, Any], raw: bytes, binary: bool
) -> None:
    head = json.dumps(body).encode()
    tried(head + raw if binary else head, str(len(head)) if binary else None)


# responses

VALUES: dict[str, NDArray[Any] | list[str]] = {
    "label": np.array([-1, 7]),
    "radius": np.array([0.0, 0.1 + 0.2]),
    "abstain": np.array([True, False]),
    "votes": np.array([[1, 2, 3, 4], [2**40, 0, 0, 1]]),
    "outcome": ["gave up", "zertifiziert \u2713"],
}


def read_by_tritonclient(body: bytes, headers: dict[str, str]) -> InferResult:
    length = headers.get(HEADER_LENGTH)
    return InferResult.from_response_body(body, header_length=None if length is None else int(length))


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(ALL), st.booleans(), min_size=1), st.none() | st.text(max_size=9))
def test_tritonclient_reads_what_is_answered(outputs: dict[str, bool], name: str | None) -> None:
    asked = InferRequest(name, IMAGES, outputs, None)
    body, headers = encode_response(MODEL, asked, VALUES)
    binary = any(outputs.values())
    assert headers["Content-Type"] == ("application/octet-stream" if binary else "application/json")
    found = read_by_tritonclient(body, headers)
    response = found.get_response()
    assert (response["model_name"], response["model_version"], response.get("id")) == ("certify", "1", name)
    assert {output["name"] for output in response["outputs"]} == set(outputs)
    for output in response["outputs"]:
        values = found.as_numpy(output["name"])
        assert output["shape"] == list(values.shape)
        if output["name"] == "outcome":
            words = [value.decode() if isinstance(value, bytes) else value for value in values]
            assert words == VALUES["outcome"]
        else:
            np.testing.assert_array_equal(values, VALUES[output["name"]])


def test_metadata_names_inputs_outputs_and_what_answers_depend_on() -> None:
    found = metadata(MODEL)
    assert json.loads(json.dumps(found)) == found
    assert found["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 3, 2, 5]}]
    assert [output["name"] for output in found["outputs"]] == ALL
    assert (found["name"], found["versions"], found["parameters"]) == ("certify", ["1"], {"sigma": 0.25})
