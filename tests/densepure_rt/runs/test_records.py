from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from densepure_rt.errors import CheckFailed
from densepure_rt.json_files import canonical, line, page, parsed
from densepure_rt.runs.records import SCHEMAS, ImageRecord, Manifest, json_schema
from densepure_rt.smoothing.certificate import EpsOutcome
from tests.support.runs import manifest

SCHEMA_FOLDER = Path(__file__).resolve().parents[3] / "docs" / "schemas"
RECORDS = st.builds(
    ImageRecord,
    idx=st.integers(0, 10**6),
    image_sha256=st.just("0123456789abcdef" * 4),
    label=st.none() | st.integers(0, 9),
    predict=st.none() | st.integers(0, 9),
    radius=st.none() | st.floats(0, 4),
    correct=st.none() | st.booleans(),
    n0=st.integers(0, 100),
    n=st.integers(0, 10**5),
    n_a=st.integers(0, 10**5),
    alpha=st.floats(0, 1),
    p_lower=st.floats(0, 1),
    stopped=st.booleans(),
    outcomes=st.lists(
        st.builds(
            EpsOutcome,
            eps=st.floats(0, 4),
            result=st.sampled_from(["certified", "gave up", "skipped"]),
            n=st.none() | st.integers(0, 9),
            n_a=st.none() | st.integers(0, 9),
        ),
        max_size=3,
    ).map(tuple),
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(RECORDS)
def test_a_record_is_read_as_it_was_written_to_the_last_digit(record: ImageRecord) -> None:
    written = line(record)
    assert parsed(ImageRecord, written, "a line") == record
    assert line(parsed(ImageRecord, written, "a line")) == written
    jsonschema.validate(json.loads(written), json_schema("record"))


@given(st.sampled_from(sorted(SCHEMAS)), st.binary(max_size=80) | JSON.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_one_clear_error(name: str, content: bytes) -> None:
    with pytest.raises(CheckFailed, match=r"^some\.json is damaged"):
        parsed(SCHEMAS[name], content, "some.json")


@given(RECORDS, st.sampled_from(["idx", "n", "alpha", "image_sha256"]), JSON)
def test_a_field_of_another_type_is_refused_as_the_schema_refuses_it(
    record: ImageRecord, field: str, value: Any
) -> None:
    document = json.loads(line(record)) | {field: value}
    validator = jsonschema.Draft202012Validator(json_schema("record"))
    try:
        parsed(ImageRecord, json.dumps(document), "a line")
    except CheckFailed as fault:
        accepted, said = False, str(fault)
    else:
        accepted, said = True, ""
    integral = isinstance(value, float) and value.is_integer()  # 3.0 is an integer to a JSON Schema, and not to us
    assert accepted == validator.is_valid(document) or (integral and not accepted)
    assert accepted or f"at {field}" in said


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_the_schemas_in_the_documentation_are_those_of_the_code(name: str) -> None:
    """`make schemas` writes them."""
    assert json.loads((SCHEMA_FOLDER / f"{name}.json").read_text()) == json_schema(name)
    jsonschema.Draft202012Validator.check_schema(json_schema(name))


def test_a_manifest_from_before_what_is_left_out_was_counted_is_read() -> None:
    document = json.loads(page(manifest()))
    for name in ("left_out", "grey_repeated"):
        del document["provenance"][name]
    found = parsed(Manifest, json.dumps(document), "a manifest")
    assert (found.provenance.left_out, found.provenance.grey_repeated) == (None, None)
    assert found == manifest()


def test_equal_values_have_one_canonical_form() -> None:
    assert (
        canonical({"b": 1, "a": [1.5, "ä"]}) == canonical({"a": [1.5, "ä"], "b": 1}) == '{"a":[1.5,"ä"],"b":1}'.encode()
    )
