"""FP8 training for PyTorch: matrix products, gradients, optimizer state and the bytes on the wire."""

__version__ = "0.1.0"
