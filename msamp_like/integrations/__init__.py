"""One file per host library; the host is imported inside its one file, and only when that file is asked for."""
