"""Sidecars written, read back, damaged; and engines that do not belong to them."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from densepure_rt.errors import CheckFailed, UsageError
from densepure_rt.runtime.bundle import (
    Accuracy,
    Bundle,
    ClassifierSidecar,
    Denoising,
    FileRef,
    Plan,
    Prediction,
    Sidecar,
    StepSidecar,
    Verdict,
    engine_file,
    is_shipped,
    open_bundle,
    read_sidecar,
    sha256_of,
    shipped_engine,
    shipped_engine_of,
    sidecar_path,
    to_json,
    verified_bytes,
)
from densepure_rt.runtime.open_device import open_device
from densepure_rt.runtime.schedule import Schedule, ScheduleName, TimestepRule, Variance
from densepure_rt.text import printable

QUICK = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
ENGINE, CLASSIFIER = "unet.onnx", "classifier.onnx"
Json = dict[str, Any]

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
WORDS = st.text(max_size=20).map(printable)  # as it is read: see test_text.py
REFS = st.builds(FileRef, st.from_regex(r"[a-z0-9_]{1,9}\.(onnx|plan)", fullmatch=True), WORDS)
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "file": REFS,
    "image": st.tuples(*[st.integers(1, 4096)] * 3),
    "pixel_range": st.just((-1.0, 1.0)),
    "precision": WORDS,
    "opset": st.integers(1, 99),
    "weights_sha256": WORDS,
    "versions": st.dictionaries(WORDS, WORDS, max_size=4),
    "data": st.none() | REFS,
    "accuracy": st.none() | st.builds(Accuracy, WORDS, *[st.integers(0, 10**6), NUMBERS, *[st.integers(0, 10**6)] * 2]),
}
FIGURES = st.dictionaries(WORDS, NUMBERS, max_size=3)
DENOISING = st.builds(
    Denoising,
    st.sampled_from(get_args(Verdict)),
    st.integers(1, 100),
    st.booleans(),
    *[FIGURES] * 2,
    *[WORDS] * 2,
    FIGURES,
)
BETA_STARTS, BETA_ENDS = st.floats(1e-9, 0.5), st.floats(0.5, 0.999)
SCHEDULES = st.builds(
    Schedule,
    st.sampled_from(get_args(ScheduleName)),
    st.integers(1, 10**6),
    BETA_STARTS,
    BETA_ENDS,
    st.floats(1e-3, 1e3),
)
SIDECARS: st.SearchStrategy[Sidecar] = st.one_of(
    st.builds(
        StepSidecar,
        kind=st.just("step"),
        schedule=SCHEDULES,
        variance=st.sampled_from(get_args(Variance)),
        prediction=st.sampled_from(get_args(Prediction)),
        timestep_rule=st.sampled_from(get_args(TimestepRule)),
        clip=st.none() | st.tuples(NUMBERS, NUMBERS),
        classifier=REFS,
        attention=st.none() | WORDS,
        denoising=st.none() | DENOISING,
        **COMMON,
    ),
    st.builds(
        ClassifierSidecar,
        kind=st.just("classify"),
        class_names=st.lists(WORDS, min_size=2, max_size=5).map(tuple),
        preprocessing=st.none() | st.dictionaries(WORDS, st.none() | st.booleans() | WORDS | st.lists(NUMBERS)),
        **COMMON,
    ),
)
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["../x", "/", ".."]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the shipped bundle; the path of its step engine."""
    folder = shipped_engine().parent
    for name in (ENGINE, CLASSIFIER):
        shutil.copy(folder / name, tmp_path / name)
        shutil.copy(sidecar_path(folder / name), sidecar_path(tmp_path / name))
    return tmp_path / ENGINE


def shipped_json(name: str) -> Json:
    values: Json = json.loads(sidecar_path(shipped_engine().with_name(name)).read_text())
    return values


def rewrite(engine: Path, change: Callable[[Json], object]) -> None:
    """Change the sidecar of `engine` in place."""
    values = json.loads(sidecar_path(engine).read_text())
    change(values)
    sidecar_path(engine).write_text(json.dumps(values))


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Where every value inside a JSON value stands."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from places(inner, (*path, key))


def changed(values: Json, path: tuple[str | int, ...], change: Callable[[Any, str | int], object]) -> Json:
    """A copy of `values` in which `change` was applied to the container and key at `path`."""
    result = copy.deepcopy(values)
    holder: Any = result
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return result


@QUICK
@given(SIDECARS)
def test_sidecar_comes_back_as_it_was_written(tmp_path: Path, sidecar: Sidecar) -> None:
    engine = tmp_path / "any.onnx"
    sidecar_path(engine).write_text(to_json(sidecar), encoding="utf-8")
    assert read_sidecar(engine) == sidecar


def test_shipped_sidecars_are_what_this_version_writes() -> None:
    for name in (ENGINE, CLASSIFIER):
        engine = shipped_engine().with_name(name)
        assert to_json(read_sidecar(engine)) == sidecar_path(engine).read_text()
        assert read_sidecar(engine).file == FileRef(name, hashlib.sha256(engine.read_bytes()).hexdigest())


def test_sidecar_of_a_file_is_its_full_name_and_json() -> None:
    assert sidecar_path(Path("a/unet.int8.onnx")) == Path("a/unet.int8.onnx.json")


def test_shipped_bundle_fits_together() -> None:
    opened = open_bundle(shipped_engine())
    assert opened.classifier_path == shipped_engine().with_name(CLASSIFIER)
    assert opened.unet.image == opened.classifier.image
    assert opened.unet.classifier.sha256 == opened.classifier.file.sha256


STEP_PLACES = sorted(places(shipped_json(ENGINE)), key=str)
CLASSIFIER_PLACES = sorted(places(shipped_json(CLASSIFIER)), key=str)
MAY_BE_ABSENT = [("clip",), ("accuracy",)]
REQUIRED = [
    path
    for path in STEP_PLACES
    if path not in MAY_BE_ABSENT and (path[0] not in ("versions", "clip", "denoising") or path == ("versions",))
]


@pytest.mark.parametrize("path", [path for path in REQUIRED if isinstance(path[-1], str)], ids=str)
def test_missing_field_is_named(bundle: Path, path: tuple[str | int, ...]) -> None:
    values = changed(shipped_json(ENGINE), path, lambda holder, key: holder.pop(key))
    sidecar_path(bundle).write_text(json.dumps(values))
    with pytest.raises(CheckFailed, match=f"'{path[-1]}'") as caught:
        read_sidecar(bundle)
    assert str(sidecar_path(bundle)) in str(caught.value)


def value_at(values: Json, path: tuple[str | int, ...]) -> object:
    found: Any = values
    for key in path:
        found = found[key]
    return found


def of_other_types(value: object) -> list[object]:
    """One value of each JSON type that cannot stand where `value` stands. An int may stand for a float."""
    fits = {str: (str,), int: (int,), float: (float, int), list: (list,), dict: (dict,)}[type(value)]
    candidates: list[object] = [None, True, {}, [], "word", -1.5, 3]
    return [other for other in candidates if type(other) not in fits]


@pytest.mark.parametrize(
    ("path", "wrong"),
    [(path, wrong) for path in REQUIRED for wrong in of_other_types(value_at(shipped_json(ENGINE), path))],
    ids=str,
)
def test_field_of_another_type_is_refused(bundle: Path, path: tuple[str | int, ...], wrong: object) -> None:
    def put(holder: Any, key: str | int) -> None:
        holder[key] = wrong

    sidecar_path(bundle).write_text(json.dumps(changed(shipped_json(ENGINE), path, put)))
    with pytest.raises(CheckFailed, match="should"):
        read_sidecar(bundle)


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "denoise"), ("variance", "fixed"), ("name", "quadratic"), ("kind", "")]
)
def test_word_that_this_version_does_not_know_is_refused(bundle: Path, field: str, value: str) -> None:
    rewrite(bundle, lambda values: (values["schedule"] if field == "name" else values).update({field: value}))
    with pytest.raises(CheckFailed, match=f"'{field}' is '{value}', this version knows"):
        read_sidecar(bundle)


@QUICK
@given(
    path=st.sampled_from(STEP_PLACES + CLASSIFIER_PLACES), value=JSON_VALUES, of=st.sampled_from([ENGINE, CLASSIFIER])
)
def test_any_value_anywhere_is_read_or_refused_with_our_errors(
    bundle: Path, path: tuple[str | int, ...], value: object, of: str
) -> None:
    def put(holder: Any, key: str | int) -> None:
        holder[key] = value

    values = shipped_json(of)
    with suppress(KeyError, IndexError, TypeError):  # a place of the other sidecar
        values = changed(values, path, put)
    sidecar_path(bundle.with_name(of)).write_text(json.dumps(values))
    try:
        with suppress(CheckFailed, UsageError):
            assert isinstance(open_bundle(bundle), Bundle)
    finally:
        sidecar_path(bundle.with_name(of)).write_text(json.dumps(shipped_json(of)))


@QUICK
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
@example(content=b"")
@example(content=b"null")
@example(content=b"\xef\xbb\xbf{}")
@example(content=b"\xff\xfe\x00")
@example(content=b"[" * 100_000)
@example(content=b'{"a":' * 100_000)
@example(content=b'{"schema_version": 1}')
def test_random_bytes_are_refused(tmp_path: Path, content: bytes) -> None:
    engine = tmp_path / ENGINE
    sidecar_path(engine).write_bytes(content)
    with pytest.raises(CheckFailed, match=r"unet\.onnx\.json"):
        read_sidecar(engine)


@QUICK
@given(st.data())
def test_truncated_sidecar_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    engine = tmp_path / ENGINE
    whole = sidecar_path(shipped_engine()).read_bytes()
    end = len(whole.rstrip()) - 1
    sidecar_path(engine).write_bytes(whole[: data.draw(st.integers(0, end))])
    with pytest.raises(CheckFailed, match="JSON"):
        read_sidecar(engine)


@pytest.mark.parametrize(
    ("text", "raised"),
    [
        ('{"schema_version": ' + "9" * 5000 + "}", ValueError),
        (to_json(read_sidecar(shipped_engine())).replace("0.02", "1" + "0" * 400), OverflowError),
    ],
    ids=["more digits than Python reads", "beyond float"],
)
def test_numbers_beyond_any_machine_are_refused(tmp_path: Path, text: str, raised: type[Exception]) -> None:
    sidecar_path(tmp_path / ENGINE).write_text(text)
    with pytest.raises(CheckFailed):
        read_sidecar(tmp_path / ENGINE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"opset"', '"opset": 17, "opset"'), "the name 'opset' twice"),
        (lambda text: text.replace("0.02", "NaN"), "NaN is no number"),
        (lambda text: text.replace("0.02", "1e999"), "'beta_end' should be a finite number"),
    ],
    ids=["a name twice", "no number", "beyond float"],
)
def test_json_of_which_two_readers_would_make_two_things_is_refused(
    tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    sidecar_path(tmp_path / ENGINE).write_text(change(sidecar_path(shipped_engine()).read_text()))
    with pytest.raises(CheckFailed, match=message):
        read_sidecar(tmp_path / ENGINE)


def test_field_that_a_later_version_may_add_is_passed_over(bundle: Path) -> None:
    before = read_sidecar(bundle)
    rewrite(bundle, lambda values: (values.update(later=1), values["schedule"].update(later=[2])))
    assert read_sidecar(bundle) == before


@pytest.mark.parametrize("batches", [[], [0], [8, -1]], ids=str)
def test_plan_of_no_batch_is_refused(tmp_path: Path, batches: list[int]) -> None:
    whole = read_sidecar(shipped_engine())
    plan = Plan("tensorrt", "10.3", tuple(batches), ("8.7",), None, whole.file, {}, {})
    sidecar_path(tmp_path / "unet.plan").write_text(to_json(replace(whole, plan=plan)))
    with pytest.raises(CheckFailed, match="'batches'.* should .*: build the plan again"):
        read_sidecar(tmp_path / "unet.plan")


@pytest.mark.parametrize("version", [0, 2, -1])
def test_another_schema_version_is_refused(bundle: Path, version: int) -> None:
    rewrite(bundle, lambda values: values.update(schema_version=version))
    with pytest.raises(CheckFailed, match=f"schema version {version}"):
        read_sidecar(bundle)


@pytest.mark.parametrize("name", ["../classifier.onnx", "/etc/passwd", "a/b.onnx", "..", ".", "", "classifier.onnx/"])
@pytest.mark.parametrize("field", ["classifier", "file"])
def test_file_names_that_leave_the_folder_are_refused(bundle: Path, field: str, name: str) -> None:
    rewrite(bundle, lambda values: values[field].update(name=name))
    with pytest.raises(CheckFailed, match="lie in one folder"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "name",
    [
        "absent.onnx",
        "a\0b",
        "\ud800",
        "x" * 300,
    ],
    ids=["absent", "null", "surrogate", "long"],
)
def test_classifier_that_cannot_be_there_is_a_usage_error(bundle: Path, name: str) -> None:
    rewrite(bundle, lambda values: values["classifier"].update(name=name))
    with pytest.raises((UsageError, CheckFailed)):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"steps": -3}, {"steps": 10**12}, {"beta_start": 0.0}, {"beta_end": 2.0}, {"beta_start": 0.5}],
    ids=str,
)
def test_schedule_that_noises_nothing_is_refused(bundle: Path, change: Json) -> None:
    rewrite(bundle, lambda values: values["schedule"].update(change))
    with pytest.raises(CheckFailed, match="not a noise schedule"):
        open_bundle(bundle)


@pytest.mark.parametrize("image", [[0, 28, 28], [1, -28, 28], [1, 28], [1, 28, 28, 1]], ids=str)
def test_impossible_image_size_is_refused(bundle: Path, image: list[int]) -> None:
    rewrite(bundle, lambda values: values.update(image=image))
    with pytest.raises(CheckFailed, match="'image'"):
        open_bundle(bundle)


def test_missing_engine_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no engine at"):
        open_bundle(tmp_path / "none.onnx")


@pytest.mark.parametrize("path", [Path("."), Path("/"), Path("tests")], ids=str)
def test_folder_without_an_engine_is_a_usage_error(path: Path) -> None:
    with pytest.raises(UsageError, match="holds no step engine"):
        open_bundle(path)


def test_the_folder_of_a_bundle_stands_for_its_step_engine(bundle: Path) -> None:
    assert open_bundle(bundle.parent).unet_path == bundle
    assert engine_file(bundle) == bundle  # whether there is one or not


def test_of_several_step_engines_in_a_folder_the_one_in_float32_is_meant_or_one_is_asked_for(tmp_path: Path) -> None:
    for name in ("unet.int8.onnx", "classifier.int8.onnx", "unet.int8.onnx.json", "unet.onnx.data"):
        (tmp_path / name).touch()
    assert engine_file(tmp_path) == tmp_path / "unet.int8.onnx"
    (tmp_path / "unet.plan").touch()
    with pytest.raises(UsageError, match=r"several step engines, unet\.int8\.onnx, unet\.plan: name the file"):
        engine_file(tmp_path)
    (tmp_path / "unet.onnx").touch()
    assert engine_file(tmp_path) == tmp_path / "unet.onnx"


@pytest.mark.parametrize("name", [ENGINE, CLASSIFIER])
def test_missing_sidecar_is_a_usage_error_that_says_what_to_copy(bundle: Path, name: str) -> None:
    sidecar_path(bundle.with_name(name)).unlink()
    with pytest.raises(UsageError, match=rf"{name}\.json.*copy it along"):
        open_bundle(bundle)


def test_missing_classifier_is_a_usage_error(bundle: Path) -> None:
    bundle.with_name(CLASSIFIER).unlink()
    with pytest.raises(UsageError, match="no classifier at"):
        open_bundle(bundle)


def test_classifier_given_as_the_engine_is_a_usage_error(bundle: Path) -> None:
    with pytest.raises(UsageError, match="is a classifier"):
        open_bundle(bundle.with_name(CLASSIFIER))


def test_engine_given_as_the_classifier_is_a_usage_error(bundle: Path) -> None:
    with pytest.raises(UsageError, match="not a classifier"):
        open_bundle(bundle, bundle)


def test_another_classifier_beside_the_engine_is_refused_unless_named(bundle: Path) -> None:
    beside = bundle.with_name(CLASSIFIER)
    rewrite(beside, lambda values: values["file"].update(sha256="0" * 64))
    with pytest.raises(CheckFailed, match="exported with another classifier"):
        open_bundle(bundle)
    assert open_bundle(bundle, beside).classifier.file.sha256 == "0" * 64


def test_classifier_of_other_images_is_a_usage_error(bundle: Path) -> None:
    rewrite(bundle.with_name(CLASSIFIER), lambda values: values.update(image=[3, 32, 32]))
    with pytest.raises(UsageError, match="cannot work together"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", [ENGINE, CLASSIFIER])
def test_engine_of_another_pixel_range_is_refused(bundle: Path, name: str) -> None:
    rewrite(bundle.with_name(name), lambda values: values.update(pixel_range=[0.0, 1.0]))
    with pytest.raises(CheckFailed, match="'pixel_range' is"):
        open_bundle(bundle)


@pytest.mark.parametrize("names", [[], ["one"], ["one", 2]], ids=str)
def test_fewer_than_two_class_names_are_refused(bundle: Path, names: list[object]) -> None:
    rewrite(bundle.with_name(CLASSIFIER), lambda values: values.update(class_names=names))
    with pytest.raises(CheckFailed, match="class_names"):
        open_bundle(bundle)


def test_pinned_hash_is_compared_with_the_sidecar(bundle: Path) -> None:
    right = hashlib.sha256(bundle.read_bytes()).hexdigest()
    for pin in (right, right.upper()):
        assert open_bundle(bundle, engine_sha256=pin).unet_path == bundle
    for pin in ("0" * 64, right[:-1], ""):
        with pytest.raises(CheckFailed, match="pins"):
            open_bundle(bundle, engine_sha256=pin)


def test_pin_holds_even_when_engine_and_sidecar_are_both_replaced(bundle: Path) -> None:
    pin = hashlib.sha256(bundle.read_bytes()).hexdigest()
    bundle.write_bytes(b"another engine")
    rewrite(bundle, lambda values: values["file"].update(sha256=hashlib.sha256(b"another engine").hexdigest()))
    open_bundle(bundle)
    with pytest.raises(CheckFailed, match="pins"):
        open_bundle(bundle, engine_sha256=pin)


@pytest.mark.parametrize("name", [ENGINE, CLASSIFIER])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "longer"])
def test_damaged_file_is_refused_before_it_is_opened(bundle: Path, name: str, damage: str) -> None:
    path = bundle.with_name(name)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-100:]
    elif damage == "longer":
        content += b"\0"
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckFailed, match=rf"{name} has SHA-256 .* damaged or is another engine"):
        open_device(open_bundle(bundle), batch=1, threads=1)


def test_verified_bytes_are_the_bytes_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "any"
    path.write_bytes(b"engine" * 1_000_000)
    digest = hashlib.sha256(b"engine" * 1_000_000).hexdigest()
    assert verified_bytes(path, digest) == b"engine" * 1_000_000
    assert sha256_of(path) == digest


def test_file_that_vanishes_after_the_bundle_was_opened_is_a_usage_error(bundle: Path) -> None:
    opened = open_bundle(bundle)
    bundle.unlink()
    with pytest.raises(UsageError, match="cannot read"):
        open_device(opened, batch=1, threads=1)


def test_sidecar_is_plain_ascii_that_any_editor_keeps(tmp_path: Path) -> None:
    named = read_sidecar(shipped_engine().with_name(CLASSIFIER))
    assert isinstance(named, ClassifierSidecar)
    text = to_json(replace(named, class_names=("Knöchelstiefel", "靴")))
    assert text.isascii()
    sidecar_path(tmp_path / CLASSIFIER).write_text(text, encoding="ascii")
    again = read_sidecar(tmp_path / CLASSIFIER)
    assert isinstance(again, ClassifierSidecar)
    assert again.class_names == ("Knöchelstiefel", "靴")


def test_the_shipped_engine_of_a_run_is_found_by_its_hash() -> None:
    for engine in (shipped_engine(), shipped_engine(on_gpu=True)):
        assert shipped_engine_of(read_sidecar(engine).file.sha256) == engine
    assert shipped_engine_of("0" * 64) == shipped_engine()


def test_the_shipped_model_is_known_by_the_weights_of_both_its_networks() -> None:
    shipped = open_bundle(shipped_engine(on_gpu=True))
    assert is_shipped(shipped)
    assert not is_shipped(replace(shipped, classifier=replace(shipped.classifier, weights_sha256="0" * 64)))
