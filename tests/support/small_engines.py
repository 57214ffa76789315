"""Small graphs in place of the shipped networks, whose every result is known; and one item's way through a device."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import parser

from densepure_rt.runtime.bundle import Bundle, open_bundle, sidecar_path
from densepure_rt.runtime.device import Batch, Device, Kind
from densepure_rt.runtime.noise import Key
from densepure_rt.runtime.schedule import Chain

ENGINE, CLASSIFIER = "unet.onnx", "classifier.onnx"
KEY: Key = (3, 4)
SIGMA = 0.5
MU, WIDTH = 0.1, 0.4  # the prior of the small step graph: every pixel N(MU, WIDTH^2)
SHAPE = (1, 4, 4)
ALARM = 2.5  # the small step graph calls an item not finite when what was drawn, std * noise, sums up to this

# x = mean + std * noise; x0 = the posterior mean of the prior; the rest is the contract of a step graph. The scale of
# x0 - MU is s w^2 / (s^2 w^2 + sigma^2) for signal s, noise sigma and prior width w.
STEP_GRAPH = f"""
<ir_version: 8, opset_import: ["" : 18]>
step (float[B,1,4,4] mean, float[B,1,4,4] std, float[B,1,4,4] noise, float[B] t, float[B,6] coef)
    => (float[B,1,4,4] mean_next, float[B,1,4,4] std_next, float[B] finite)
<float mu = {{{MU}}}, float w2 = {{{WIDTH**2}}}, float half = {{0.5}}, float limit = {{LIMIT}}, float one = {{1.0}},
 int64[4] column = {{-1, 1, 1, 1}}, int64[3] pixels = {{1, 2, 3}}, int64[1] first = {{1}}>
{{
    sigma_, signal_, a_, b_, low_, high_ = Split <axis = 1, num_outputs = 6> (coef)
    sigma = Reshape(sigma_, column)
    signal = Reshape(signal_, column)
    a = Reshape(a_, column)
    b = Reshape(b_, column)
    low = Reshape(low_, column)
    drawn = Mul(std, noise)
    x = Add(mean, drawn)
    s_mu = Mul(signal, mu)
    apart = Sub(x, s_mu)
    s_w2 = Mul(signal, w2)
    s2_w2 = Mul(signal, s_w2)
    sigma2 = Mul(sigma, sigma)
    spread = Add(s2_w2, sigma2)
    gain = Div(s_w2, spread)
    moved = Mul(gain, apart)
    x0 = Add(moved, mu)
    part0 = Mul(a, x0)
    partx = Mul(b, x)
    mean_next = Add(part0, partx)
    halflog = Mul(half, low)
    std_ = Exp(halflog)
    zeros = Sub(x, x)
    std_next = Add(zeros, std_)
    sum = ReduceSum <keepdims = 0> (drawn, pixels)
    quiet = Less(sum, limit)
    finite = Cast <to = 1> (quiet)
}}
"""
CLASSIFY_GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
classify (float[B,1,4,4] mean) => (float[B,3] logits)
<int64[2] flat = {0, -1}, float[3] edge = {0.0, -1.2, -1.0}, float[1,3] slope = {0.0, 1.0, 2.0}, int64[1] pixels = {1}>
{
    flattened = Reshape(mean, flat)
    total = ReduceSum <keepdims = 1> (flattened, pixels)
    scaled = Mul(total, slope)
    logits = Add(scaled, edge)
}
"""
BATCH_MEAN_GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
classify (float[B,1,4,4] mean) => (float[B,3] logits)
<int64[2] flat = {0, -1}, int64[1] batch = {0}, int64[1] begin = {0}, int64[1] end = {3}, int64[1] axis = {1}>
{
    centre = ReduceMean <keepdims = 1> (mean, batch)
    apart = Sub(mean, centre)
    flattened = Reshape(apart, flat)
    logits = Slice(flattened, begin, end, axis)
}
"""


def replace_file(engine: Path, content: bytes, **fields: object) -> None:
    """Put other bytes in place of a file of a bundle, and make the sidecars say so."""
    engine.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    own = json.loads(sidecar_path(engine).read_text())
    own["file"]["sha256"] = digest
    sidecar_path(engine).write_text(json.dumps(own | fields))
    if own["kind"] == "classify":
        unet = engine.with_name(ENGINE)
        values = json.loads(sidecar_path(unet).read_text())
        values["classifier"]["sha256"] = digest
        sidecar_path(unet).write_text(json.dumps(values))


def small_bundle(engine: Path, limit: float = 1e30, classifier: str = CLASSIFY_GRAPH) -> Bundle:
    """The shipped bundle with small graphs in place of its networks."""
    graph = parser.parse_model(STEP_GRAPH.replace("LIMIT", str(limit)))
    replace_file(engine, graph.SerializeToString(), image=SHAPE)
    names = ["low", "middle", "high"]
    content = parser.parse_model(classifier).SerializeToString()
    replace_file(engine.with_name(CLASSIFIER), content, image=SHAPE, class_names=names)
    return open_bundle(engine)


def items(kind: Kind, chain: Chain, handle: int, samples: list[int], slots: list[int], step: int = 0) -> Batch:
    """One item for each sample, in its own slot, for vote 0."""
    return Batch.of(chain, kind, slots, image=handle, sample=samples, step=step)


def finish(device: Device, batch: Batch) -> NDArray[np.int64] | None:
    ticket = device.submit(batch)
    found, labels = device.collect()
    assert found == ticket
    return labels


def picture(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8)


def trajectory(device: Device, chain: Chain, samples: list[int], slots: list[int], image: NDArray[np.uint8]) -> bytes:
    """Every state of the first sample on its way, and its label, as bytes: samples are run together, step by step."""
    device.reserve(max(slots) + 1)
    handle = device.open_image(image, KEY, SIGMA, chain.scale)
    assert finish(device, items("smooth", chain, handle, samples, slots)) is None
    seen = []
    for step in range(len(chain)):
        seen += [part.tobytes() for part in device.read(slots[:1])]
        assert finish(device, items("step", chain, handle, samples, slots, step)) is None
    seen += [part.tobytes() for part in device.read(slots[:1])]
    labels = finish(device, items("classify", chain, handle, samples, slots))
    assert labels is not None
    assert labels.shape == (len(samples),)
    device.close_image(handle)
    return b"".join([*seen, labels[:1].tobytes()])
