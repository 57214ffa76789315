"""ONNX engines -> TensorRT plans with their sidecars: one builder over both flavours. Needs no PyTorch.

`tensorrt` builds on the GPU that the plan is for. `tensorrt-rtx` builds ahead of time, on any machine, for a list of
compute capabilities. Networks are strongly typed: the precision is the ONNX file's, and is read back after parsing.
"""

from __future__ import annotations

import dataclasses
import math
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx

from densepure_rt import files
from densepure_rt.errors import CheckFailed, DensePureError, EnvironmentFault, UsageError
from densepure_rt.export.convert.build_options import HARDWARE, TILING, BuildOptions
from densepure_rt.export.convert.publish import Publication, refuse_replacement
from densepure_rt.export.models.onnx_graph import (
    described,
    parsed_model,
    refuse_for_tensorrt,
    refuse_other_weights,
    refuse_unbuildable,
)
from densepure_rt.optional import optional
from densepure_rt.runtime import gpu
from densepure_rt.runtime.bundle import (
    ON_GPU,
    Bundle,
    FileRef,
    Flavour,
    Plan,
    Sidecar,
    is_shipped,
    open_bundle,
    plan_path,
    shipped_engine,
    verified_engine,
)
from densepure_rt.runtime.tensorrt_api import import_flavour, new_logger

RTX_CAPABILITIES = ("8.6", "8.9", "12.0")  # what an RTX plan is built for unless told: Ampere, Ada and Blackwell cards
ENTERPRISE_ONLY = {"8.7": "Orin", "9.0": "Hopper", "10.0": "Blackwell data centre", "10.3": "Blackwell data centre"}
PRECISION_TYPES = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16", "int8": "INT8", "fp8": "FP8"}
DLA_PRECISIONS = ("fp16", "int8")
MULTIPLYING = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")  # layers whose element type is a network's precision

# What a message of TensorRT points at, and what to do about it; the first that matches is named.
CAUSES = (
    (
        r"out of memory|OutOfMemory|Requested amount of GPU memory|insufficient memory|bad_alloc",
        "memory",
        "use a smaller `batches` or `workspace`, or close what else holds the GPU's memory",
    ),
    (
        r"HW-specific datatypes|is not supported for|FP32 GEMM is not supported|not supported on (this|SM)",
        "a precision that one of those GPUs lacks",
        "leave that GPU out of `compute_capabilities`, or export another `precision`",
    ),
    (
        r"[Uu]nsupported|not supported|No importer|no importer|plugin",
        "an operator that this TensorRT does not know",
        "export the ONNX file again with densepure-rt, or use a newer TensorRT",
    ),
)


def source_bundle(
    out: Path,
    precision: str | None = None,
    engine: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """The ONNX engines to build plans from: `engine` and its classifier, else those in `out`, else the ones that ship.

    precision: of the plans; None for that of the engines, but fp16 for the model that ships. Where only float32 engines
    are there, they are written into `out` in that precision; see `to_precision`. Raises UsageError for others.
    """
    if precision is not None and precision not in PRECISION_TYPES:
        raise UsageError(f"`precision` {precision}: plans are built in {', '.join(PRECISION_TYPES)}")
    own = (path for path in (out / "unet.onnx", out / f"unet.{ON_GPU}.onnx") if path.is_file())
    source = engine or next(own, shipped_engine())
    bundle = open_bundle(source)
    if bundle.unet.plan is not None:
        raise UsageError(f"{source.name} is a plan: give the ONNX engine that it was built from")
    if precision is None and (engine is not None or not is_shipped(bundle)):
        return bundle
    if precision is None:
        say(f"building the model that ships in {ON_GPU}, as GPUs run it; `precision` fp32 is for float32")
        precision = ON_GPU
    name = f"unet{'' if precision == 'fp32' else '.' + precision}.onnx"
    if engine is None and (out / name).is_file():
        return open_bundle(out / name)
    if bundle.unet.precision == precision:
        return bundle
    if is_shipped(bundle) and (ready := shipped_engine().with_name(name)).is_file():
        return open_bundle(ready)
    with optional("another precision", "ONNX Runtime", "run \"pip install 'densepure-rt[cpu]'\""):
        from densepure_rt.export.convert.to_precision import lower_bundle
        from densepure_rt.export.models.check_images import check_images
    images = check_images(bundle, say=say)
    return open_bundle(lower_bundle(bundle, out, precision, images, say=say).unet)


def build_plans(
    bundle: Bundle,
    out: Path,
    flavour: Flavour,
    options: BuildOptions,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Path, Path]:
    """Build the plans of a bundle of ONNX engines into `out`, each with its sidecar: the step plan, the classifier's.

    Nothing in `out` changes until both are built, but TensorRT's timings, which make the next build quick.

    Raises UsageError for options that the flavour lacks or when `out` holds plans of another model, CheckFailed when
    TensorRT refuses a graph or a sidecar lies, EnvironmentFault when TensorRT or its GPU is not there or `out` cannot
    be written.
    """
    options.refuse_what_lacks(flavour)
    if options.use_dla_core is not None and bundle.unet.precision not in DLA_PRECISIONS:
        raise UsageError(
            f"`use_dla_core` {options.use_dla_core}: a DLA multiplies fp16 and int8, {bundle.unet_path.name} is "
            f"{bundle.unet.precision}; give `precision` {' or '.join(DLA_PRECISIONS)}"
        )
    if not force:
        refuse_replacement(
            out,
            {
                plan_path(path, flavour).name: sidecar.weights_sha256
                for path, sidecar in ((bundle.unet_path, bundle.unet), (bundle.classifier_path, bundle.classifier))
            },
        )
    trt = import_flavour(flavour)
    capabilities = targets(trt, flavour, options)
    with Publication(out) as publication:
        classifier = _build_one(
            publication, trt, flavour, bundle.classifier_path, bundle.classifier, options, capabilities, say
        )
        unet = dataclasses.replace(bundle.unet, classifier=classifier)
        step = _build_one(publication, trt, flavour, bundle.unet_path, unet, options, capabilities, say)
    return out / step.name, out / classifier.name


def targets(trt: Any, flavour: Flavour, options: BuildOptions) -> tuple[str, ...]:
    """The compute capabilities to build for. Raises UsageError for one that tensorrt-rtx does not have."""
    if flavour == "tensorrt":
        return (gpu.find().compute_capability,)
    known = {
        f"{name[2:-1]}.{name[-1]}": name for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)
    }
    asked = options.compute_capabilities or RTX_CAPABILITIES
    for capability in asked:
        if capability in known:
            continue
        advice = f"it has {', '.join(known)}"
        if capability in ENTERPRISE_ONLY:
            advice = f"for {ENTERPRISE_ONLY[capability]} use `target` tensorrt on that device"
        raise UsageError(f"tensorrt-rtx {trt.__version__} has no compute capability {capability}: {advice}")
    return tuple(dict.fromkeys(asked))


def _build_one(
    publication: Publication,
    trt: Any,
    flavour: Flavour,
    path: Path,
    sidecar: Sidecar,
    options: BuildOptions,
    capabilities: tuple[str, ...],
    say: Callable[[str], None],
) -> FileRef:
    content = verified_engine(path, sidecar)
    cached = options.with_cache(publication.out) if flavour == "tensorrt" else options
    plan, types = build(trt, flavour, content, path, sidecar.precision, cached, capabilities, say)
    name = plan_path(path, flavour).name
    facts = Plan(
        flavour=flavour,
        version=trt.__version__,
        batches=options.batches,
        compute_capabilities=capabilities,
        gpu=gpu.find().name if flavour == "tensorrt" else None,
        onnx=sidecar.file,
        types=types,
        recipe=options.recipe(),
    )
    ref = publication.write(name, plan)
    publication.add(dataclasses.replace(sidecar, file=ref, plan=facts, data=None))
    return ref


def build(
    trt: Any,
    flavour: Flavour,
    content: bytes,
    path: Path,
    precision: str,
    options: BuildOptions,
    capabilities: tuple[str, ...],
    say: Callable[[str], None] = lambda line: None,
) -> tuple[bytes, dict[str, int]]:
    """The plan of one ONNX file, and the element types that it multiplies in, with their number of layers.

    content: the file's bytes; path: where it lies, for its name and its external data. Raises CheckFailed with the
    ONNX node, the PyTorch module behind it, the likely cause and the next move.
    """
    model = parsed_model(content, path)
    refuse_other_weights(model, path)
    refuse_unbuildable(model, path.name)
    refuse_for_tensorrt(model, path.name)
    # TensorRT's objects hold no references to each other: all of these must live until the end.
    logger = new_logger(trt)
    builder = new_builder(trt, flavour, logger)
    refuse_missing_dla(builder, options, trt.__version__)
    # Always so in tensorrt-rtx and in tensorrt 11, which take the flag all the same.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    say(f"parsing {path.name}")
    if not parser.parse(content, str(path)):
        raise CheckFailed(parse_failure(parser, model, path, flavour, trt.__version__))
    types = multiplying_types(trt, network)
    if types and precision in PRECISION_TYPES and PRECISION_TYPES[precision] not in types:
        raise CheckFailed(
            f"{path.name} should be {precision} by its sidecar, but its {sum(types.values())} convolutions and matrix "
            f"products are {', '.join(types)}: export it again with `precision` {precision}"
        )
    config = builder.create_builder_config()
    if len(options.batches) == 1:
        fix_shapes(network, options.batches[0])
    for batch in options.batches:
        add_profile(builder, config, network, batch)
    configure(trt, flavour, config, options, capabilities)
    cache = load_timing_cache(config, options)
    with progress(trt, config, say, f"building {plan_path(path, flavour).name}") as interrupted:
        blob = builder.build_serialized_network(network, config)
    if interrupted():
        raise KeyboardInterrupt
    if blob is None:
        raise CheckFailed(build_failure(logger, model, path, flavour, trt.__version__))
    if cache is not None and options.timing_cache is not None:
        try:
            options.timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
        except OSError as error:  # the plan is worth more than the cache
            say(f"could not keep the timings in {options.timing_cache} ({error.strerror}); going on")
    return bytes(blob), types


def new_builder(trt: Any, flavour: Flavour, logger: Any) -> Any:
    if flavour == "tensorrt":
        gpu.find()  # without a driver the builder says less
    try:
        return trt.Builder(logger)
    except Exception as error:  # pybind11 gives a TypeError when the factory returned nothing
        raise EnvironmentFault(
            f'{flavour} {trt.__version__} cannot build here ({logger.summary() or error}): run "densepure-rt doctor"'
        ) from error


def refuse_missing_dla(builder: Any, options: BuildOptions, version: str) -> None:
    """Raise UsageError when the DLA core that was asked for is not there."""
    core, here = options.use_dla_core, builder.num_DLA_cores
    if core is not None and core >= here:
        raise UsageError(
            f"`use_dla_core` {core}: TensorRT {version} finds {here} DLA cores here; a Jetson Orin has them, and "
            f"10.7 was the last version to run them: leave `use_dla_core` out"
        )


def fix_shapes(network: Any, batch: int) -> None:
    """Give the inputs the one batch that will come, so that shapes are constants before anything is chosen."""
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        tensor.shape = (batch, *tuple(tensor.shape)[1:])


def add_profile(builder: Any, config: Any, network: Any, batch: int) -> None:
    """Add a profile of one fixed batch: nothing is chosen for shapes that never come."""
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        shape = (batch, *tuple(tensor.shape)[1:])
        profile.set_shape(tensor.name, shape, shape, shape)
    if config.add_optimization_profile(profile) < 0:
        raise CheckFailed(f"TensorRT takes no profile of batch {batch}: export the engine with a free batch dimension")


def configure(trt: Any, flavour: Flavour, config: Any, options: BuildOptions, capabilities: tuple[str, ...]) -> None:
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:  # it is on by default, and gives float32 products the mantissa of a half
        config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what `inspect --layers` shows; it costs no time
    # That each image of a batch is multiplied and reduced alike, wherever it stands: what a certificate rests on, and
    # what the probe looks at in any case. The library gives it for one profile alone.
    if len(options.batches) == 1 and "DISTRIBUTIVE_INDEPENDENCE" in trt.BuilderFlag.__members__:
        config.set_flag(trt.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace << 20)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if flavour == "tensorrt-rtx":
        config.num_compute_capabilities = len(capabilities)
        for i, capability in enumerate(capabilities):
            config.set_compute_capability(trt.ComputeCapability.__members__[f"SM{capability.replace('.', '')}"], i)
    if options.hardware is not None:
        levels = trt.HardwareCompatibilityLevel.__members__
        if (level := HARDWARE[options.hardware]) not in levels:
            raise UsageError(f"`hardware` {options.hardware}: {flavour} {trt.__version__} does not have it")
        config.hardware_compatibility_level = levels[level]
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)  # no host code in a plan
    if options.timing_cache_strict:
        config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    if options.avg_timing is not None:
        config.avg_timing_iterations = options.avg_timing
    if options.tiling_optimization_level is not None:
        if not hasattr(config, "tiling_optimization_level"):
            raise UsageError(f"`tiling_optimization_level`: {flavour} {trt.__version__} does not have it; leave it out")
        level = TILING[options.tiling_optimization_level]
        config.tiling_optimization_level = trt.TilingOptimizationLevel.__members__[level]
    if options.use_dla_core is not None:
        config.default_device_type, config.DLA_core = trt.DeviceType.DLA, options.use_dla_core
        if options.allow_gpu_fallback:
            config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def load_timing_cache(config: Any, options: BuildOptions) -> Any:
    """The cache of kernel timings that makes a second build quick, and choose the same kernels."""
    if options.timing_cache is None:
        return None
    try:
        known = files.content(options.timing_cache, "model") if options.timing_cache.exists() else b""
    except (OSError, DensePureError) as error:
        if not options.renew_cache:
            why = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"cannot read `timing_cache` {options.timing_cache} ({why})") from error
        known = b""
    if options.timing_cache_strict and not known:
        raise UsageError(f"`timing_cache_strict` needs a cache, and {options.timing_cache} is not there yet")
    for content in (known, b"") if options.renew_cache else (known,):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    raise CheckFailed(f"{options.timing_cache} is not a timing cache of this TensorRT and this GPU: name another file")


def multiplying_types(trt: Any, network: Any) -> dict[str, int]:
    """Element types of what the convolutions and matrix products multiply, by TensorRT's names, with their number.

    Behind a dequantize layer it is the quantized type.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    quantized = {
        layer.get_output(0).name: layer.get_input(0).dtype for layer in layers if layer.type == trt.LayerType.DEQUANTIZE
    }
    multiplying = {trt.LayerType.__members__[name] for name in MULTIPLYING}
    found: Counter[str] = Counter()
    for layer in layers:
        if layer.type in multiplying:
            source = layer.get_input(0)
            found[quantized.get(source.name, source.dtype).name] += 1
    return dict(found.most_common())


@contextmanager
def progress(trt: Any, config: Any, say: Callable[[str], None], what: str) -> Iterator[Callable[[], bool]]:
    """Say how far a build is; yields a function that tells whether Ctrl-C stopped it.

    An exception must not cross TensorRT's frames, so Ctrl-C is noted and the build asked to stop at its next step.
    """
    stopped: list[int] = []

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is known at run time only
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int]] = {}
            self.tenth = -1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            parent, steps = self.phases[phase_name]
            tenth = math.floor(10 * (step + 1) / max(1, steps))
            if not parent and tenth > self.tenth:
                self.tenth = tenth
                say(f"{what}: {min(100, 10 * tenth)} %")
            return not stopped

        def phase_finish(self, phase_name: str) -> None:
            pass

    monitor = Monitor()
    config.progress_monitor = monitor
    say(what)
    try:
        before = signal.signal(signal.SIGINT, lambda number, frame: stopped.append(number))
    except ValueError:  # not in the main thread: Ctrl-C does not come here
        before = None
    try:
        yield lambda: bool(stopped)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
        config.progress_monitor = None


def parse_failure(parser: Any, model: onnx.ModelProto, path: Path, flavour: Flavour, version: str) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    nodes = {node.name: node for node in model.graph.node}
    node = next((nodes[error.node_name()] for error in errors if error.node_name() in nodes), None)
    return failure("parse", "; ".join(error.desc() for error in errors), node, path, flavour, version)


def build_failure(logger: Any, model: onnx.ModelProto, path: Path, flavour: Flavour, version: str) -> str:
    text = logger.summary()
    named = [node for node in model.graph.node if re.search(rf"\b{re.escape(node.name)}\b", text)]
    return failure("build", text, max(named, key=lambda node: len(node.name), default=None), path, flavour, version)


def failure(what: str, text: str, node: onnx.NodeProto | None, path: Path, flavour: Flavour, version: str) -> str:
    cause, move = next(
        ((cause, move) for pattern, cause, move in CAUSES if re.search(pattern, text)),
        ("not known", 'report it with the output of "densepure-rt doctor --json"'),
    )
    where = f" at {described(node)}" if node is not None else ""
    return f"{flavour} {version} cannot {what} {path.name}{where}: {text}. Likely cause: {cause}; {move}"
