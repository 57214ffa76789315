"""Functions by name, and .pt2 files: what they give, and that no file runs code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densepure_rt.errors import CheckFailed, DensePureError, UsageError
from densepure_rt.export.convert.step_graph import ClassifyGraph
from densepure_rt.export.convert.to_onnx import to_onnx
from densepure_rt.export.models.programs import (
    built,
    exported_program,
    is_container,
    is_expression,
    load_callable,
    permitted,
)
from densepure_rt.runtime.onnx_device import open_session

Archive = dict[str, bytes]
MODEL = "models/model.json"
CONFIG = "data/weights/model_weights_config.json"
SAMPLES = "data/sample_inputs/model.pt"


class Network(nn.Module):
    """A convolution, a buffer, a constant and the batch size: everything that an archive stores in another way."""

    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.register_buffer("gain", torch.ones(1, 3, 1, 1))
        self.shift = torch.full((2,), 3.0)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            x = x * self.gain
        pooled = torch.einsum("bchw,hw->bc", self.first(x) + self.shift.sum(), torch.ones(6, 6) / 36)
        return {"logits": self.last(pooled.reshape(x.shape[0], -1))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "network.pt2"
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Network().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},))
        torch.export.save(program, path)
    return path


def records(path: Path) -> Archive:
    with zipfile.ZipFile(path) as archive:
        return {entry: archive.read(entry) for entry in archive.namelist()}


def changed(saved: Path, tmp_path: Path, change: Callable[[Archive, str], None]) -> Path:
    """A copy of the archive, uncompressed as torch wants it, after `change` of its records below its one folder."""
    entries = records(saved)
    change(entries, next(iter(entries)).partition("/")[0] + "/")
    path = tmp_path / "changed.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def pickled(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edited(entries: Archive, name: str, edit: Callable[[Any], None]) -> None:
    document = json.loads(entries[name])
    edit(document)
    entries[name] = json.dumps(document).encode()


def pickled_samples(entries: Archive, root: str, marker: Path) -> None:
    entries[root + SAMPLES] = pickled(((Bomb(marker),), {}))


def pickled_weight(entries: Archive, root: str, marker: Path) -> None:
    entries[root + "data/weights/weight_0"] = pickled(Bomb(marker))
    edited(entries, root + CONFIG, lambda c: c["config"]["first.weight"].update(use_pickle=True))


def pickled_object(entries: Archive, root: str, marker: Path) -> None:
    entries[root + "data/constants/opaque_obj_0"] = pickle.dumps(Bomb(marker))
    edited(
        entries,
        root + "data/constants/model_constants_config.json",
        lambda c: c["config"].update(
            bomb={"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        ),
    )


def expression(entries: Archive, root: str, marker: Path) -> None:
    text = entries[root + MODEL].decode()
    call = f"__import__('os').mkdir('{marker}')"
    entries[root + MODEL] = text.replace("Symbol('s77', positive=True, integer=True)", call).encode()
    assert entries[root + MODEL] != text.encode(), "torch names the batch otherwise now"


def guard(entries: Archive, root: str, marker: Path) -> None:
    edited(entries, root + MODEL, lambda m: m["guards_code"].append(f"__import__('os').mkdir('{marker}') is None"))


ATTACKS = [pickled_samples, pickled_weight, pickled_object, expression, guard]


@pytest.mark.parametrize("attack", ATTACKS)
def test_torch_itself_would_run_what_the_file_brings(
    saved: Path, tmp_path: Path, attack: Callable[[Archive, str, Path], None]
) -> None:
    """Else the tests below prove nothing."""
    marker = tmp_path / "ran"
    path = changed(saved, tmp_path, lambda entries, root: attack(entries, root, marker))
    with warnings.catch_warnings(), contextlib.suppress(Exception):
        warnings.simplefilter("ignore")
        torch.export.load(path).module()(torch.zeros(2, 3, 8, 8))
    assert marker.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_here_it_does_not_run(saved: Path, tmp_path: Path, attack: Callable[[Archive, str, Path], None]) -> None:
    marker = tmp_path / "ran"
    path = changed(saved, tmp_path, lambda entries, root: attack(entries, root, marker))
    if attack is guard:  # not needed, so not run
        assert exported_program(path)(torch.zeros(2, 3, 8, 8))["logits"].shape == (2, 5)
    else:
        with pytest.raises(CheckFailed, match="could run code from the file"):
            exported_program(path)
    assert not marker.exists()


def injected_name(entries: Archive, root: str) -> None:
    entries[root + MODEL] = entries[root + MODEL].replace(b'"name": "x"', b'"name": "x=print(1)"')


def injected_weight(entries: Archive, root: str) -> None:
    for name in (MODEL, CONFIG):
        entries[root + name] = entries[root + name].replace(b"first.weight", b"first.weight')+print('")


def hidden_expression(name: str) -> Callable[[Archive, str], None]:
    """A tensor called as what is not looked at elsewhere, its size an expression that runs."""
    size = {"as_expr": {"expr_str": "print(1)", "hint": None}}

    def change(entries: Archive, root: str) -> None:
        def hide(document: Any) -> None:
            values = document["graph_module"]["graph"]["tensor_values"]
            values[name] = next(iter(values.values())) | {"sizes": [size]}

        edited(entries, root + MODEL, hide)

    return change


def another_target(target: str) -> Callable[[Archive, str], None]:
    def change(entries: Archive, root: str) -> None:
        edited(entries, root + MODEL, lambda m: m["graph_module"]["graph"]["nodes"][0].update(target=target))

    return change


def added(name: str) -> Callable[[Archive, str], None]:
    return lambda entries, root: entries.update({name.format(root=root): b"{}"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (injected_name, r"has 'x=print\(1\)' as name"),
        (injected_weight, "first.weight"),
        (another_target("torch.serialization.os.system"), "calls 'torch.serialization.os.system'"),
        (another_target("torch.hub.load"), "calls 'torch.hub.load'"),
        (another_target("_operator.methodcaller"), "calls '_operator.methodcaller'"),
        (another_target("torch.ops.aten.from_file.default"), "calls 'torch.ops.aten.from_file.default'"),
        (another_target("#triton:evil"), "calls '#triton:evil'"),
        (hidden_expression("metadata"), r"has 'print\(1\)' as expr_str"),
        (hidden_expression("guards_code"), r"has 'print\(1\)' as expr_str"),
        (hidden_expression("as_string"), r"has 'print\(1\)' as expr_str"),
        (added("{root}data/aotinductor/model/model.so"), "holds .*model.so"),
        (added("{root}data/weights/model.pt"), "holds .*data/weights/model.pt"),
        (added("{root}models/other.json"), "holds .*models/other.json"),
        (added("version"), "holds 'version'"),
        (added("other/archive_format"), "holds"),
    ],
)
def test_what_is_more_than_a_graph_and_its_weights_is_refused(
    saved: Path, tmp_path: Path, change: Callable[[Archive, str], None], said: str
) -> None:
    with pytest.raises(CheckFailed, match=f"{said}.*package.module:function"):
        exported_program(changed(saved, tmp_path, change))


def test_program_computes_what_was_exported_at_any_batch(saved: Path) -> None:
    program, network = exported_program(saved), Network().eval()
    assert program.train() is program.eval()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(program(x)["logits"], network(x)["logits"])


def test_program_is_exported_once_more_to_onnx(saved: Path) -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.program = exported_program(saved)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.program(x)["logits"]
            return logits

    x = torch.randn(3, 3, 8, 8)
    content = to_onnx(ClassifyGraph(Logits()), (x[:2],), ["mean"], ["logits"])
    session = open_session(content, "program", ["mean"], ["logits"])
    (found,) = session.run(["logits"], {"mean": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), Network().eval()(x)["logits"], atol=1e-5, rtol=1e-5)


class Segments(nn.Module):
    """It reads as far as its offsets say, unchecked."""

    offsets: Tensor

    def __init__(self, end: int) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, end]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.segment_reduce(x.flatten(), "sum", offsets=self.offsets, unsafe=True)


def test_operator_that_reads_any_memory_is_refused_before_it_runs(tmp_path: Path) -> None:
    program = torch.export.export(Segments(6), (torch.zeros(2, 3),))
    program.state_dict["offsets"] = torch.tensor([0, 1 << 45])  # run, it ends this process
    torch.export.save(program, tmp_path / "segments.pt2")
    with pytest.raises(CheckFailed, match=r"calls 'torch.ops.aten.segment_reduce.default'.*package.module:function"):
        exported_program(tmp_path / "segments.pt2")


def of_version_25() -> bytes:
    """An archive that asks for a version of the format that there is not."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/models/model.json", "{}")
    content = bytearray(buffer.getvalue())
    content[content.index(b"PK\x01\x02") + 6] = 255
    return bytes(content)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04" + bytes(50), of_version_25()])
def test_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "network.pt2").write_bytes(content)
    with pytest.raises(DensePureError, match="not a program of torch.export.save|it is empty"):
        exported_program(tmp_path / "network.pt2")


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    """torch would unpack a record of any size into memory."""
    with zipfile.ZipFile(tmp_path / "a.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/models/model.json", b" " * 2**20)
    with pytest.raises(CheckFailed, match=r"a compressed archive \(a/models/model.json\)"):
        exported_program(tmp_path / "a.pt2")


def test_state_dict_is_no_program(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt2")
    with pytest.raises(DensePureError, match="weights.pt2 holds '.*data.pkl'"):
        exported_program(tmp_path / "weights.pt2")


def test_program_of_an_older_torch_is_told_apart(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        for name in ("version", "serialized_exported_program.json", "serialized_state_dict.pt"):
            archive.writestr(name, b"8.5")
    with pytest.raises(UsageError, match="format of torch 2.8 or older"):
        exported_program(tmp_path / "old.pt2")


def test_missing_program_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the program .*No such file"):
        exported_program(tmp_path / "none.pt2")


def test_operators_that_compute_are_permitted() -> None:
    for target in (
        "torch.ops.aten.conv2d.default",
        "torch.ops.aten.scaled_dot_product_attention.default",
        "torch.ops.aten.relu_.default",
        "torch.ops.aten.add_.Tensor",
        "torch.ops.aten.upsample_nearest2d.vec",
        "torch.ops.aten._unsafe_view.default",
        "torch.ops.higher_order.wrap_with_set_grad_enabled",
        "torch.sym_max",
        "math.ceil",
        "_operator.getitem",
    ):
        assert permitted(target), target
    for other in ("torch.ops.aten.conv2d", "torch.ops.mine.conv.default", "os.system", "", None, "math.os"):
        assert not permitted(other), other


@pytest.mark.parametrize(
    "name",
    [
        *(
            "as_strided.default",
            "as_strided_.default",
            "empty.memory_format",
            "empty_strided.default",
            "resize_.default",
        ),
        *("set_.source_Tensor", "from_file.default", "_make_per_tensor_quantized_tensor.default", "add.out"),
        *(
            "sparse_coo_tensor.indices",
            "_nested_view_from_buffer.default",
            "_embedding_bag.default",
            "_fft_c2r.default",
        ),
        *("convolution_backward.default", "segment_reduce.default", "nothing_of_this_name.default"),
    ],
)
def test_operators_that_trust_their_arguments_are_not_permitted(name: str) -> None:
    assert not permitted(f"torch.ops.aten.{name}")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Mul(Integer(2), Symbol('s0'))", True),
        ("FloorDiv(s0 + 3, 2)", True),
        ("Eq(s0, 4)", True),
        ("s0.__class__", False),
        ("Symbol('s0').evalf()", False),
        ("print(1)", False),
        ("Float('1e-05')", True),
        ("Integer('print(1)')", False),
        ("Integer('os.system')", False),
        ("(lambda: 1)()", False),
        ("[x for x in y]", False),
        ("f'{print(1)}'", False),
        ("a" * 5 + "(" * 5000, False),
    ],
)
def test_expressions_are_arithmetic_of_symbols(text: str, plain: bool) -> None:
    assert is_expression(text) is plain


def test_containers_are_plain() -> None:
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}

    def tree(kind: str, context: str) -> str:
        return json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])

    assert is_container(tree("builtins.dict", '["logits"]'))
    assert is_container(tree("builtins.tuple", "null"))
    assert not is_container(tree("collections.defaultdict", '{"default_factory_module": "os"}'))
    assert not is_container(tree("builtins.dict", '["a", {"b": 1}]'))
    assert not is_container("print(1)")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory."""
    name = f"networks_{os.urandom(4).hex()}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "class Tiny(torch.nn.Module):\n    def forward(self, x): return x.flatten(1)[:, :3]\n"
        "class Namespace:\n    make = Tiny\n"
        "tiny = Tiny()\nNUMBER = 3\n"
        "def make(): return Tiny()\n"
        "def number(): return 3\n"
        "def fails(): raise RuntimeError('no weights\\nat all')\n"
        "def leaves(): raise SystemExit(3)\n"
        "def wants(path): return Tiny()\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("import a_package_that_is_nowhere\n")
    (tmp_path / f"{name}_syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    return name


@pytest.mark.parametrize("what", ["make", "Tiny", "tiny", "Namespace.make"])
def test_network_of_a_module_in_the_working_directory(module: str, what: str) -> None:
    assert built(f"{module}:{what}")(torch.ones(2, 1, 2, 2)).tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (":none", "has no 'none'; it has .*make"),
        (":NUMBER", "is a int: name a function that returns the network"),
        (":number", r"\(\) gives a int: it should return a torch.nn.Module"),
        (":fails", r"\(\) ended in RuntimeError: no weights$"),
        (":leaves", r"\(\) ended in SystemExit: 3"),
        (":wants", r"\(\) ended in TypeError: .*path"),
        ("_broken:make", "importing .*_broken ended in ModuleNotFoundError: .*a_package_that_is_nowhere"),
        ("_syntax:f", "importing .*_syntax ended in SyntaxError"),
        ("_nowhere:make", "no module '.*_nowhere' in .*only the working directory"),
        (".inner:make", "importing|no module"),
        ("", "is not package.module:function"),
        (":a b", "is not package.module:function"),
    ],
)
def test_what_cannot_be_called_is_one_line(module: str, what: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        built(module + what)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["math:ceil", "torch.nn:Linear", "http.server:HTTPServer"])
def test_function_of_an_installed_package_is_not_looked_for(module: str, name: str) -> None:
    with pytest.raises(UsageError, match="only the working directory is looked in"):
        load_callable(name)


def test_a_module_whose_name_is_taken_is_not_mistaken_for_another(module: str) -> None:
    Path("json.py").write_text("def dumps(): raise SystemExit")
    with pytest.raises(UsageError, match="another module 'json' is in use already"):
        load_callable("json:dumps")
