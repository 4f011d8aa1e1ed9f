"""Collectives on scaled tensors, and data parallelism built on them."""

if __name__ != "msamp_like.comm":
    raise ImportError(
        f"this folder is the package msamp_like.comm, got an import of {__name__!r}; "
        "run 'pip install -e .' once and import msamp_like.comm"
    )
