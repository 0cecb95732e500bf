"""Real text: where it is found, the byte-level BPE trained on it, and the batches drawn from it."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_overlap.commands.progress import saying
from moe_overlap.commands.train.files import read_tensors, write_tensors
from moe_overlap.commands.train.seeds import generator
from moe_overlap.errors import ConfigError
from moe_overlap.launch.stopping import interruptible
from moe_overlap.measure.files import read_regular, write_atomically

SUFFIXES = (".txt", ".rst", ".md", ".py", ".c", ".h", ".html", ".tex")
END_OF_DOCUMENT = "<|endoftext|>"
HELD_OUT_SHARE = 0.05
DEBIAN_PACKAGE = "python3.11-doc"
_NOT_LIBRARY = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}
MOST_BYTES = 1 << 30  # of all documents
# Bytes of one piece, within which pairs are merged: the time that takes grows with the square of the longest piece.
# Words and runs of blanks of ordinary text are shorter.
LONGEST_PIECE = 256
_FORMAT = b"moe_overlap text 2"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token streams (int32, 1-D) of the text; `key` is a digest of text and vocabulary, `source` what the text is."""

    train: torch.Tensor
    held_out: torch.Tensor
    vocab: int
    key: str
    source: str

    def batch(self, step: int, *, seed: int, batch: int, seq: int, rank: int, ranks: int) -> torch.Tensor:
        """int64 [batch / ranks, seq + 1]: this rank's slice of the batch of `step`.

        Windows start anywhere; the choice depends on (seed, step) alone, so the step is the whole data position.
        """
        starts = torch.randint(0, len(self.train) - seq, (batch,), generator=generator("batch", seed, step))
        return windows(self.train, starts.chunk(ranks)[rank], seq)

    def held_out_batches(self, *, tokens: int, batch: int, seq: int, rank: int, ranks: int) -> list[torch.Tensor]:
        """This rank's batches, int64 [batch / ranks, seq + 1], of the first `tokens` held-out tokens, whole batches."""
        num_batches = max(1, min(tokens, len(self.held_out) - 1) // (batch * seq))
        starts = torch.arange(num_batches * batch) * seq
        return [windows(self.held_out, rows.chunk(ranks)[rank], seq) for rows in starts.split(batch)]

    def unigram_entropy(self, *, tokens: int, batch: int, seq: int) -> float:
        """Nats per token of the held-out targets under their own token frequencies: no context can do better."""
        windows = self.held_out_batches(tokens=tokens, batch=batch, seq=seq, rank=0, ranks=1)
        counts = torch.bincount(torch.cat(windows)[:, 1:].flatten(), minlength=self.vocab).double()
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * shares.log()).sum())


def windows(stream: torch.Tensor, starts: torch.Tensor, seq: int) -> torch.Tensor:
    """int64 [N, seq + 1]: the tokens from each of N starts on."""
    return stream[starts[:, None] + torch.arange(seq + 1)].long()


def load_corpus(text: str | None, out: str, *, vocab: int, batch: int, seq: int) -> Corpus:
    """The corpus of `--text`. The tokenizer and the tokens are made once and kept under `out`, named by content.

    ConfigError when there is no such text or too little of it for one batch of held-out tokens.
    """
    documents, source = find_documents(text)
    needed = math.ceil((batch * seq + 1) / HELD_OUT_SHARE)
    most = sum(map(len, documents)) + len(documents)
    if most < needed:  # said before the tokenizer is trained, where that is clear
        raise ConfigError("--text", source, f"at least {needed} tokens of text (it has {most} bytes)")
    key = _digest(documents, vocab)
    stream = _token_stream(documents, Path(out), vocab, key)
    split = len(stream) - math.ceil(len(stream) * HELD_OUT_SHARE)
    corpus = Corpus(train=stream[:split], held_out=stream[split:], vocab=vocab, key=key, source=source)
    if len(corpus.held_out) <= batch * seq:
        raise ConfigError("--text", source, f"at least {needed} tokens of text (it has {len(stream)})")
    return corpus


def find_documents(text: str | None) -> tuple[list[bytes], str]:
    """(documents, what they are). The order depends on contents only, never on file names or the file system."""
    found, source = _found(text)
    return [document for document, _ in found], source


def find_folders(text: str | None) -> list[str]:
    """The folder of each document, in the order of `find_documents`."""
    return [str(path.parent) for _, path in _found(text)[0]]


def _found(text: str | None) -> tuple[list[tuple[bytes, Path]], str]:
    if text is not None:
        paths, source = _user_files(text), text
    elif paths := _debian_files():
        source = DEBIAN_PACKAGE
    else:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(root).parts)]
        source = "the standard library's sources"
    found = list(zip(_read_documents(paths, asked_for=text), paths, strict=True))
    # Sorted by hash: a fixed shuffle, so that the held-out end of the stream is a fair sample of files.
    found.sort(key=lambda one: (hashlib.sha256(one[0]).digest(), one[1]))
    return found, source


def _user_files(text: str) -> list[Path]:
    path = Path(text)
    if text and path.is_file():
        return [path]
    if not text or not path.is_dir():
        raise ConfigError("--text", text, "an existing text file or a folder of text files")
    paths = [child for child in path.rglob("*") if child.suffix in SUFFIXES and child.is_file()]
    if not paths:
        raise ConfigError("--text", text, f"a folder with files that end in {' '.join(SUFFIXES)}")
    return paths


def _debian_files() -> list[Path]:
    """The reStructuredText sources of Python's documentation, if the Debian package is installed."""
    try:
        listing = subprocess.run(["dpkg", "-L", DEBIAN_PACKAGE], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    paths = (Path(line) for line in listing.stdout.splitlines() if line.endswith(".rst.txt"))
    return [path for path in paths if path.is_file()]


def _read_documents(paths: Iterable[Path], *, asked_for: str | None) -> Iterator[bytes]:
    """The contents of text files. ConfigError where one cannot be read or is binary, or where all are too much."""
    left = MOST_BYTES
    for path in paths:
        try:
            document = read_regular(path, most_bytes=left)
        except OSError as error:
            expected = f"readable files of at most {MOST_BYTES} bytes in all ({path}: {error.strerror})"
            raise ConfigError("--text", asked_for or str(path), expected) from None
        if b"\0" in document:
            raise ConfigError("--text", asked_for or str(path), f"text, not binary data ({path} has zero bytes)")
        left -= len(document)
        yield document


def _token_stream(documents: list[bytes], out: Path, vocab: int, key: str) -> torch.Tensor:
    """int32 [N]: the documents' tokens, an end token after each. Cached under `out`."""
    tokens_file = out / f"tokens-{key}.safetensors"
    tokenizer_file = tokenizer_of(out, key)
    cached = _cached(tokens_file, tokenizer_file)
    if cached is not None:
        return cached
    texts = [document.decode("utf-8", errors="replace") for document in documents]
    with saying(f"training a tokenizer of {vocab} tokens on {sum(map(len, documents)):,} bytes of text"):
        tokenizer_json, stream = interruptible(lambda: _train_and_encode(texts, vocab))
    write_atomically(tokenizer_file, tokenizer_json.encode())
    write_tensors(tokens_file, {"tokens": stream}, _digests(stream, tokenizer_json.encode()))
    return stream


def tokenizer_of(out: Path, key: str) -> Path:
    """The file of the tokenizer of a corpus with this key."""
    return out / f"tokenizer-{key}.json"


def _cached(tokens_file: Path, tokenizer_file: Path) -> torch.Tensor | None:
    """The tokens, if both files are there as they were written: a damaged cache is made again."""
    try:
        tensors, digests = read_tensors(tokens_file)
        tokenizer = read_regular(tokenizer_file, most_bytes=MOST_BYTES)
    except (ConfigError, OSError):
        return None
    stream = tensors.get("tokens")
    if stream is None or stream.dtype != torch.int32 or stream.dim() != 1:
        return None
    return stream if digests == _digests(stream, tokenizer) else None


def _digests(stream: torch.Tensor, tokenizer: bytes) -> dict[str, str]:
    """What the file of tokens says about itself and about the tokenizer beside it."""
    return {
        "sha256": hashlib.sha256(stream.contiguous().numpy().tobytes()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
    }


def _digest(documents: Iterable[bytes], vocab: int) -> str:
    digest = hashlib.sha256(_FORMAT + b" %d" % vocab)
    for document in documents:
        digest.update(hashlib.sha256(document).digest())
    return digest.hexdigest()[:16]


def _train_and_encode(texts: list[str], vocab: int) -> tuple[str, torch.Tensor]:
    """(tokenizer as JSON, int32 tokens). The result does not depend on the number of threads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # After ByteLevel a character is a byte.
    bounded = pre_tokenizers.Split(Regex(f".{{1,{LONGEST_PIECE}}}"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False), bounded])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The text itself may hold the end marker: as text it must not become the special token.
    tokenizer.encode_special_tokens = True
    end = torch.tensor([tokenizer.token_to_id(END_OF_DOCUMENT)], dtype=torch.int32)
    pieces: list[torch.Tensor] = []
    for encoding in tokenizer.encode_batch_fast(texts):
        pieces += [torch.tensor(encoding.ids, dtype=torch.int32), end]
    return tokenizer.to_str(), torch.cat(pieces)
