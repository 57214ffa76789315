"""A loaded classifier in a child process that was forked: it works or says why not, and never hangs.

All of it runs in processes of its own, which are ended when they take too long.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # in which a script ends even on a loaded machine; one that hangs never does
START = """
import os, sys, traceback, warnings
import numpy as np
import densepure_rt
from densepure_rt.images.datasets import LabelledImage
from densepure_rt.errors import DensePureError
from densepure_rt.smoothing.settings import Settings

warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks in a process with threads
image = np.zeros((1, 28, 28), np.uint8)
image[:, 8:20, 8:20] = 200
asked = {"sigma": 0.25, "radii": (0, 0.25), "steps": 1}


def in_child(work):
    "What `work` returns in a forked child, or the error that it ends in."
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            said = repr(work())
        except DensePureError as error:
            said = f"{type(error).__name__}: {error}"
        except BaseException:
            said = traceback.format_exc()
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    os.wait()
    return os.read(reader, 1 << 16).decode()


"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def said_by(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", START + script], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_classifier_that_was_used_before_a_fork_certifies_the_same_in_the_child_and_goes_on_in_the_parent() -> None:
    assert "same same" in said_by("""
secret = bytes(32)
with densepure_rt.load(threads=2, batch=8, secret=secret) as classifier:
    before = classifier.certify(image, **asked)
    child = in_child(lambda: classifier.certify(image, **asked))
    after = classifier.certify(image, **asked)
print("same" if child == repr(before) else child, "same" if after == before else after)
""")


def test_a_child_of_a_child_works_too_and_so_does_one_that_was_forked_before_the_first_use() -> None:
    assert "same same" in said_by("""
classifier = densepure_rt.load(threads=1, batch=8, secret=bytes(32))
unused = in_child(lambda: classifier.certify(image, **asked))
used = lambda: classifier.certify(image, **asked) and in_child(lambda: classifier.certify(image, **asked))
grandchild = eval(in_child(used))  # what the grandchild said, as the child passes it on
expected = repr(classifier.certify(image, **asked))
print(*("same" if found == expected else found for found in (unused, grandchild)))
""")


def test_an_iteration_that_the_parent_began_ends_in_one_error_in_the_child() -> None:
    """Batches are under way in the parent's threads at the moment of the fork, and the engines with them."""
    said = said_by(
        """
classifier = densepure_rt.load(threads=2, batch=1, secret=bytes(32))
images = [LabelledImage(i, image, None) for i in range(3)]
work = classifier.certify_each(images, Settings(sigma=0.25, steps=1, n=2000, method="fixed"))
device, submit = classifier.device, classifier.device.submit
children = []


def submit_and_fork(batch):
    ticket = submit(batch)
    if batch.kind == "step" and not children and not all(future.done() for future in device._outstanding):
        children.append(in_child(lambda: device.collect()))
        children.append(in_child(lambda: classifier.certify(image, **asked)))
    return ticket


device.submit = submit_and_fork
next(work)
print(*children, sep="\\n")
""".replace("\\\\n", "\\n")
    )
    first, *_ = said.splitlines()
    assert first.startswith("EnvironmentFault: this process was forked")
    assert "load it in the child process" in first or "begin a new one" in first


def test_an_iteration_that_rests_goes_on_in_the_child_as_it_does_in_the_parent() -> None:
    assert "same True" in said_by("""
classifier = densepure_rt.load(threads=1, batch=8, secret=bytes(32))
images = [LabelledImage(i, np.full((1, 28, 28), i, np.uint8), None) for i in range(3)]
work = classifier.certify_each(images, Settings(sigma=0.25, steps=1, n=64))
next(work)
assert not classifier.device._outstanding
child = in_child(lambda: next(work).certificate)
other = in_child(lambda: classifier.certify(image, **asked).n > 0)  # the parent is busy, the child is not
parent = repr(next(work).certificate)
print("same" if child == parent else (child, parent), other)
""")
