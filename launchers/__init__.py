"""Training programs, one script each, to be read top to bottom: ``python -m msamp_like.launchers.pretrain --help``."""

if __name__ != "msamp_like.launchers":
    raise ImportError(
        f"this folder is the package msamp_like.launchers, got an import of {__name__!r}; "
        "run 'pip install -e .' once and import msamp_like.launchers"
    )
