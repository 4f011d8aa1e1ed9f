"""Models in plain PyTorch, one paper a file: they know nothing of FP8, of process groups, or of this package."""
