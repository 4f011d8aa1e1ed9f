"""Training programs, one script each, to be read top to bottom: ``python -m msamp_like.launchers.pretrain --help``."""
