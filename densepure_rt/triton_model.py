"""The name under which repositories that were exported before modules had rooms import their model."""

from densepure_rt.serving.triton_model import TritonModel

__all__ = ["TritonModel"]
