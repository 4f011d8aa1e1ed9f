"""The corpus: the same text everywhere, held out by file, in an order that depends on the step alone."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import numpy
import pytest
import torch

from msamp_like.launchers.corpus import Batches, Corpus, held_out_names, load_corpus, validation_batches

CONTEXT = 16


@pytest.fixture(scope="module")
def library() -> Corpus:
    return load_corpus(vocab_size=256, context=256)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """200 files of about 600 bytes in two folders, one of them hidden."""
    for i in range(200):
        path = tmp_path / "text" / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {i:03d} says: naïve café\n" * 20, encoding="utf-8")
    (tmp_path / "text" / ".git").mkdir()
    (tmp_path / "text" / ".git" / "index").write_bytes(b"\0\1")
    return tmp_path / "text"


def load(data: Path | str, **changes: object) -> Corpus:
    return load_corpus(str(data), **{"vocab_size": 256, "context": CONTEXT, **changes})  # type: ignore[arg-type]


def test_default_corpus_is_pythons_own_source(library: Corpus) -> None:
    record = library.record
    assert record["python"] == platform.python_version()
    assert record["source"].startswith("Python ")
    assert len(record["sha256"]) == 64
    assert record["files"] > 200
    assert record["bytes"] > 3_000_000
    assert len(library.train) + len(library.validation) == record["bytes"] + record["files"]
    assert 0.01 < len(library.validation) / len(library.train) < 0.03
    assert "class " in bytes(library.train[:20_000]).decode(errors="replace")


def test_the_record_is_of_the_files_in_the_order_of_their_names(folder: Path) -> None:
    record = load(folder).record
    paths = sorted(folder.glob("part*/*.txt"), key=lambda path: path.relative_to(folder).as_posix())
    whole = b"".join(path.read_bytes() for path in paths)
    assert (record["files"], record["bytes"]) == (200, len(whole))
    assert record["sha256"] == hashlib.sha256(whole).hexdigest()


def test_validation_is_held_out_by_file(folder: Path) -> None:
    corpus = load(folder)
    documents = [set(bytes(part).decode().strip("\0").split("\0")) for part in (corpus.train, corpus.validation)]
    assert not documents[0] & documents[1]
    assert len(documents[0]) + len(documents[1]) == 200
    assert 1 <= len(documents[1]) <= 4


def test_a_held_out_file_stays_held_out_when_others_come() -> None:
    few = {f"{i}.txt": 100 for i in range(200)}
    more = {**few, **{f"new{i}.txt": 100 for i in range(20)}}
    assert 0 < len(held_out_names(few)) <= 4
    assert held_out_names(few) & set(few) >= held_out_names(more) & set(few)


@pytest.mark.parametrize("sizes", [{"a": 10}, {"a": 10, "b": 20}, {"a": 1, "b": 500, "c": 400}])
def test_few_files_still_part_into_two(sizes: dict[str, int]) -> None:
    held_out = held_out_names(sizes, min_bytes=10)
    assert held_out < set(sizes)
    assert bool(held_out) == (len(sizes) > 1)
    assert not held_out or sum(sizes[name] for name in held_out) >= 10


def test_one_file_is_held_out_by_its_tail(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(chr(97 + i % 26) for i in range(5000)))
    corpus = load(path)
    assert bytes(corpus.train) + bytes(corpus.validation) == path.read_bytes() + b"\0"
    assert len(corpus.validation) == 100
    assert corpus.record["validation_split"] == "tail of the file"


def test_a_glob_takes_what_it_matches(folder: Path) -> None:
    assert load(f"{folder}/**/*0.txt").record["files"] == 20


# --- order ----------------------------------------------------------------------------------------------------------


def batches(library: Corpus, *, world: int = 1, micro_batches: int = 1, seed: int = 0) -> Batches:
    return Batches(
        tokens=library.train, context=CONTEXT, batch_size=8, micro_batches=micro_batches, world=world, seed=seed
    )


def test_targets_are_the_next_tokens_of_the_text(library: Corpus) -> None:
    tokens, targets = batches(library)(3, 0, 0)
    assert tokens.shape == targets.shape == (8, CONTEXT)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    row = bytes([*tokens[0].tolist(), int(targets[0, -1])])
    assert row in bytes(library.train)


@pytest.mark.parametrize(("world", "micro_batches"), [(2, 1), (4, 2), (1, 8)])
def test_ranks_and_micro_batches_share_the_sequences_of_a_step(library: Corpus, world: int, micro_batches: int) -> None:
    whole = batches(library)(5, 0, 0)[0]
    order = batches(library, world=world, micro_batches=micro_batches)
    shared = [order(5, micro, rank)[0] for micro in range(micro_batches) for rank in range(world)]
    assert torch.equal(torch.cat(shared), whole)


def test_order_depends_on_seed_and_step_and_on_nothing_before(library: Corpus) -> None:
    first = batches(library)(7, 0, 0)[0]
    assert torch.equal(batches(library)(7, 0, 0)[0], first)
    assert not torch.equal(batches(library)(8, 0, 0)[0], first)
    assert not torch.equal(batches(library, seed=1)(7, 0, 0)[0], first)


def test_sequences_start_anywhere_with_equal_odds() -> None:
    tokens = numpy.arange(10 + CONTEXT, dtype=numpy.uint32)
    order = Batches(tokens=tokens, context=CONTEXT, batch_size=5000, micro_batches=1, world=1, seed=0)
    counts = torch.bincount(order(0, 0, 0)[0][:, 0], minlength=10)
    assert len(counts) == 10
    assert (counts - 500).abs().max() < 110  # five standard deviations of a binomial


def test_validation_batches_are_fixed_and_do_not_overlap(library: Corpus) -> None:
    tokens = numpy.arange(1000, dtype=numpy.uint32)
    made = validation_batches(tokens, context=CONTEXT, count=5, batch_size=4)
    assert [len(batch[0]) for batch in made] == [4] * 5
    seen = torch.cat([batch[1] for batch in made]).flatten()
    assert len(seen.unique()) == len(seen) == 5 * 4 * CONTEXT
    assert seen.max() > 900
    everything = validation_batches(tokens, context=CONTEXT, count=100, batch_size=4)
    assert sum(len(batch[0]) for batch in everything) == 999 // CONTEXT


# --- bad input ------------------------------------------------------------------------------------------------------


def test_bad_files_are_named(tmp_path: Path, folder: Path) -> None:
    empty, binary, latin = tmp_path / "empty.txt", tmp_path / "binary.bin", tmp_path / "latin.txt"
    empty.write_bytes(b"")
    binary.write_bytes(b"text\0text" * 100)
    latin.write_bytes("café".encode("latin-1") * 100)
    with pytest.raises(ValueError, match=r"every file of '.*empty\.txt' is empty"):
        load(empty)
    with pytest.raises(ValueError, match=r"binary\.bin has a NUL byte"):
        load(binary)
    with pytest.raises(ValueError, match=r"latin\.txt has bytes that are not UTF-8 at 3"):
        load(latin)
    with pytest.raises(ValueError, match=r"leave it out with a glob"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="found none at"):
        load(tmp_path / "missing" / "*.txt")


@pytest.mark.parametrize("size", [1, CONTEXT, CONTEXT + 1, 2 * CONTEXT])
def test_a_corpus_shorter_than_two_sequences_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "short.txt").write_text("x" * size)
    with pytest.raises(ValueError, match=f"more tokens than one sequence.*context {CONTEXT}; give more text"):
        load(tmp_path / "short.txt")


def test_bytes_need_a_vocabulary_of_256(folder: Path) -> None:
    with pytest.raises(ValueError, match="the model has 100; raise --vocab-size"):
        load(folder, vocab_size=100)


# --- tokenizer ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_file(folder: Path, tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train([str(path) for path in folder.glob("part*/*.txt")], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_tokenizer_makes_fewer_tokens_of_the_same_text(folder: Path, tokenizer_file: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    corpus = load(folder, tokenizer=str(tokenizer_file), vocab_size=384)
    assert corpus.train.dtype == numpy.uint16
    assert len(corpus.train) < len(load(folder).train) / 2
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    separator = tokenizer.token_to_id("<|endoftext|>")
    first = corpus.train[: corpus.train.tolist().index(separator)]
    assert tokenizer.decode(first.tolist()).strip().startswith("file ")
    assert corpus.record["tokenizer"]["vocabulary"] == tokenizer.get_vocab_size()


def test_a_tokenizer_that_does_not_fit_is_refused(folder: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has \d+ tokens and the model 128; give --vocab-size"):
        load(folder, tokenizer=str(tokenizer_file), vocab_size=128)
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not JSON with a `model`"):
        load(folder, tokenizer=str(tmp_path / "other.json"))
    with pytest.raises(FileNotFoundError, match="is no file"):
        load(folder, tokenizer=str(tmp_path / "none.json"))
