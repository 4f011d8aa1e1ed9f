"""Checkpoints: what a run needs to go on, as safetensors and JSON, never as pickle."""
