"""Text as two arrays of tokens, one to train on and one held out, and an order of batches that restarts exactly.

Without ``data`` the corpus is the Python standard library's own source and ``pydoc_data``: real text, on every machine,
never downloaded. Tokens are bytes unless a Hugging Face ``tokenizer.json`` is given (extra ``text``).

Validation text is held out by file, chosen by a hash of the file's name, so no sentence of it is seen in training; one
single file is held out by its tail.

Sequence number n of a run starts at a place drawn from counter n of a Philox generator (Salmon et al., "Parallel Random
Numbers: As Easy as 1, 2, 3", SC 2011) under the run's seed. So a batch is a pure function of its step; any number of
ranks and micro-batches share the same sequences of a step among them; and a resume needs no state.

The corpus is held in memory once.
"""

from __future__ import annotations

import glob
import hashlib
import json
import platform
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

HELD_OUT = 0.02
"""Share of the bytes that is kept for validation."""

# Tests repeat themselves, encodings are tables of escapes, idlelib, lib2to3 and turtledemo are not on every machine.
_NOT_CORPUS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings", "__pycache__"}
_NOT_CORPUS |= {"site-packages", "dist-packages"}
Tokens = NDArray[Any]  # integers, of the smallest unsigned type that holds the vocabulary

_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokens to train on and tokens held out, and where they came from (JSON)."""

    train: Tokens  # (tokens,), uint8, uint16 or uint32
    validation: Tokens  # (tokens,)
    record: Mapping[str, Any]


def load_corpus(data: str = "", tokenizer: str = "", *, vocab_size: int, context: int) -> Corpus:
    """The corpus of a file, a folder or a glob, or of the standard library if ``data`` is empty.

    Raises ValueError or FileNotFoundError for no file, an empty, binary or too short corpus, and for a tokenizer whose
    vocabulary exceeds ``vocab_size``.
    """
    encoder = tokenizer_encoder(tokenizer, vocab_size) if tokenizer else byte_encoder(vocab_size)
    found = dict(_library_files() if not data else _files(data))
    sizes = {name: path.stat().st_size for name, path in found.items()}
    if not any(sizes.values()):
        raise ValueError(f"the corpus must hold text, every file of {data or 'it'!r} is empty; give another --data")
    held_out = held_out_names(sizes, min_bytes=4 * context)
    digest = hashlib.sha256()
    parts = {name: bytearray() for name in ("train", "validation")}
    for name, path in found.items():
        text = _read(path)
        digest.update(text)
        part = parts["validation" if name in held_out else "train"]
        part += encoder.encode(text).tobytes() + encoder.separator.tobytes()
    train, validation = (numpy.frombuffer(part, dtype=encoder.separator.dtype) for part in parts.values())
    if len(found) == 1:
        tail = max(int(HELD_OUT * len(train)), context + 1)
        train, validation = train[:-tail], train[-tail:]
    for name, tokens in (("training", train), ("validation", validation)):
        if len(tokens) <= context:
            raise ValueError(
                f"a corpus must hold more tokens than one sequence, its {name} part has {len(tokens)} for context "
                f"{context}; give more text with --data, or a smaller --context"
            )
    record = {
        "source": data or f"Python {platform.python_version()} standard library",
        "python": platform.python_version(),
        "files": len(found),
        "bytes": sum(sizes.values()),
        "sha256": digest.hexdigest(),
        "tokenizer": encoder.record,
        "train_tokens": len(train),
        "validation_tokens": len(validation),
        "validation_split": "tail of the file" if len(found) == 1 else f"{len(held_out)} files",
    }
    return Corpus(train=train, validation=validation, record=record)


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Training batches as a function of (step, micro-batch, rank); nothing is remembered between calls."""

    tokens: Tokens
    context: int
    batch_size: int  # sequences of a step over all ranks and micro-batches
    micro_batches: int
    world: int
    seed: int

    def __call__(self, step: int, micro_batch: int, rank: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets), int64, each of shape (batch_size / micro_batches / world, context)."""
        count = self.batch_size // (self.micro_batches * self.world)
        first = step * self.batch_size + (micro_batch * self.world + rank) * count
        windows = len(self.tokens) - self.context
        # A counter gives four words, the first places the sequence: each sequence has a counter of its own.
        words = numpy.random.Philox(key=self.seed, counter=first).random_raw(4 * count)[::4]
        return _windows(self.tokens, (words % numpy.uint64(windows)).astype(numpy.int64), self.context)


def validation_batches(tokens: Tokens, *, context: int, count: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """At most ``count`` batches of sequences spread evenly over ``tokens`` without overlap; the same every time."""
    available = (len(tokens) - 1) // context
    sequences = min(count * batch_size, available)
    starts = numpy.arange(sequences) * available // sequences * context
    return [_windows(tokens, starts[first : first + batch_size], context) for first in range(0, sequences, batch_size)]


def _windows(tokens: Tokens, starts: Tokens, context: int) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(tokens[starts[:, None] + numpy.arange(context + 1)].astype(numpy.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# --- files ----------------------------------------------------------------------------------------------------------


def held_out_names(sizes: Mapping[str, int], *, min_bytes: int = 0) -> set[str]:
    """Names of the files held out: in the order of a hash of the name, each that still fits ``HELD_OUT`` of the bytes.

    If those have fewer than ``min_bytes``, the smallest file that has so many too. None of a single file.
    """
    if len(sizes) == 1:
        return set()
    budget = HELD_OUT * sum(sizes.values())
    chosen: set[str] = set()
    taken = 0
    for name in sorted(sizes, key=_hash):
        if taken + sizes[name] <= budget:
            chosen.add(name)
            taken += sizes[name]
    if taken < min_bytes:
        large = [name for name in sizes if sizes[name] >= min_bytes] or list(sizes)
        chosen.add(min(large, key=lambda name: (sizes[name], _hash(name))))
    return chosen


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _library_files() -> Iterator[tuple[str, Path]]:
    """(name, path) of the standard library's sources, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    if not found:
        raise FileNotFoundError(f"the default corpus is the source of Python's library, {root} has none; give --data")
    for name in sorted(found):
        *folders, file = name.split("/")
        # _sysconfigdata is written by the build of each interpreter: no text, and different on every machine
        if not _NOT_CORPUS.intersection(folders) and not file.startswith("_sysconfigdata"):
            yield name, found[name]


def _files(data: str) -> Iterator[tuple[str, Path]]:
    """(name, path) of one file, of every file under a folder that is not hidden, or of what a glob matches."""
    root = Path(data)
    if root.is_file():
        yield root.name, root
        return
    paths = root.rglob("*") if root.is_dir() else map(Path, glob.glob(data, recursive=True))
    base = root if root.is_dir() else Path()
    found = {path.relative_to(base).as_posix() if root.is_dir() else path.as_posix(): path for path in paths}
    visible = {name: path for name, path in found.items() if not _hidden(name) and path.is_file()}
    if not visible:
        raise FileNotFoundError(
            f"--data must be a text file, a folder of them or a glob that matches some, found none at {data!r}"
        )
    for name in sorted(visible):
        yield name, visible[name]


def _hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _read(path: Path) -> bytes:
    text = path.read_bytes()
    problem = "a NUL byte" if b"\0" in text else ""
    if not problem:
        try:
            text.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"bytes that are not UTF-8 at {error.start}"
    if problem:
        raise ValueError(
            f"a corpus is UTF-8 text, {path} has {problem}; convert the file, or leave it out with a glob such as "
            "--data 'folder/**/*.txt'"
        )
    return text


# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Text to tokens; ``separator`` stands between files and has no element where the tokenizer knows no such token."""

    encode: Callable[[bytes], Tokens]
    separator: Tokens
    record: Mapping[str, Any] | str


def byte_encoder(vocab_size: int) -> Encoder:
    """Bytes as tokens: text has no NUL, so a NUL can stand between files."""
    if vocab_size < 256:
        raise ValueError(f"bytes as tokens need a vocabulary of 256, the model has {vocab_size}; raise --vocab-size")
    separator = numpy.zeros(1, dtype=numpy.uint8)
    return Encoder(encode=lambda text: numpy.frombuffer(text, numpy.uint8), separator=separator, record="bytes")


def tokenizer_encoder(file: str, vocab_size: int) -> Encoder:
    """The tokens of a Hugging Face tokenizer file; raises ValueError if the model's vocabulary is smaller."""
    try:
        import tokenizers
    except ImportError as error:
        raise ModuleNotFoundError(
            f"--tokenizer {file} needs the package `tokenizers`; pip install 'msamp-like[text]', or train on bytes"
        ) from error
    definition = _definition(Path(file))
    tokenizer = tokenizers.Tokenizer.from_str(definition)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    if size > vocab_size:
        raise ValueError(
            f"a tokenizer's vocabulary must fit the model's, {file} has {size} tokens and the model {vocab_size}; "
            f"give --vocab-size {-(-size // 128) * 128}"
        )
    dtype = numpy.uint16 if size <= 1 << 16 else numpy.uint32
    ends = [vocabulary[name] for name in _END_OF_TEXT if name in vocabulary]
    record = {"file": file, "sha256": hashlib.sha256(definition.encode()).hexdigest(), "vocabulary": size}

    def encode(text: bytes) -> Tokens:
        return numpy.array(tokenizer.encode(text.decode("utf-8"), add_special_tokens=False).ids, dtype=dtype)

    return Encoder(encode=encode, separator=numpy.array(ends[:1], dtype=dtype), record=record)


def _definition(path: Path) -> str:
    """Text of a tokenizer file; its own reader would raise a bare Exception."""
    if not path.is_file():
        raise FileNotFoundError(f"--tokenizer must be a Hugging Face tokenizer.json, {path} is no file; give its path")
    try:
        text = path.read_text(encoding="utf-8")
        described = json.loads(text)
    except ValueError:
        described = None
    if not isinstance(described, dict) or "model" not in described:
        raise ValueError(
            f"--tokenizer must be a Hugging Face tokenizer.json, {path} is not JSON with a `model`; save the tokenizer "
            "again with tokenizer.save(path)"
        )
    return text
