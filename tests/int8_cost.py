"""`python -m tests.int8_cost ENGINE...`: what exact int8 costs on a CPU without VNNI, in instructions.

valgrind's CPU has AVX2 and nothing newer. The instructions of a call are those that a process of eleven calls takes
beyond one of a single call, divided by ten.
"""

from __future__ import annotations

import re
import subprocess
import sys

from densepure_rt.runtime.onnx_device import EXACT_INT8

BATCH = 8
CALLS = f"""
import sys
import numpy as np, onnxruntime
engine, exact, calls = sys.argv[1], sys.argv[2] == "exact", int(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
if exact:
    options.add_session_config_entry(*{EXACT_INT8!r})
session = onnxruntime.InferenceSession(engine, options, providers=["CPUExecutionProvider"])
draw = np.random.default_rng(0)
shapes = {{i.name: [{BATCH} if isinstance(size, str) else size for size in i.shape] for i in session.get_inputs()}}
feed = {{name: draw.standard_normal(shape, np.float32) / 2 for name, shape in shapes.items()}}
for _ in range(calls):
    session.run(None, feed)
"""


def instructions(engine: str, mode: str, calls: int) -> int:
    """Count the instructions of a process that calls an engine so many times."""
    tool = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"]
    command = [*tool, sys.executable, "-c", CALLS, engine, mode, str(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count = re.search(r"I +refs: +([\d,]+)", done.stderr)
    assert count is not None, done.stderr
    return int(count[1].replace(",", ""))


def main() -> None:
    for engine in sys.argv[1:]:
        plain, exact = (
            (instructions(engine, mode, 11) - instructions(engine, mode, 1)) // 10 for mode in ("saturating", "exact")
        )
        print(f"{engine}: {plain:,} instructions a batch of {BATCH}, {exact:,} exact: {exact / plain:.2f} times")


if __name__ == "__main__":
    main()
