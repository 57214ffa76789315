"""Build machine: PyTorch to ONNX. The only part of the package that may import torch."""
