"""The text of the job: found, cut into tokens, shared out."""

import os
import time

import pytest
import torch
from safetensors.torch import save_file

from moe_overlap.commands import progress
from moe_overlap.commands.train import text as text_module
from moe_overlap.commands.train.text import find_documents
from moe_overlap.errors import ConfigError
from tests.commands.train.jobs import corpus_of


@pytest.mark.parametrize("make", ["missing", "empty_folder", "binary", "too_short"])
def test_bad_text_is_refused(make, tmp_path):
    path = tmp_path / "text.txt"
    if make == "empty_folder":
        path.mkdir()
        (path / "picture.png").write_bytes(b"png")
    elif make == "binary":
        path.write_bytes(b"a\0b" * 1000)
    elif make == "too_short":
        path.write_text("too short")
    with pytest.raises(ConfigError) as caught:
        corpus_of(path, tmp_path / "out")
    assert (caught.value.field, caught.value.value) == ("--text", str(path))


def test_the_default_text_is_there():
    documents, source = find_documents(None)
    assert sum(map(len, documents)) > 5_000_000 and source


def test_tokens_depend_on_contents_only_and_are_cached(text, tmp_path):
    first = corpus_of(text, tmp_path / "a")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, file in enumerate(sorted(text.iterdir())):
        (renamed / f"{9 - number}.txt").write_bytes(file.read_bytes())
    second = corpus_of(renamed, tmp_path / "b")
    assert first.key == second.key and torch.equal(first.train, second.train)
    (tokenizer_a,) = (tmp_path / "a").glob("tokenizer-*.json")
    (tokenizer_b,) = (tmp_path / "b").glob("tokenizer-*.json")
    assert tokenizer_a.read_bytes() == tokenizer_b.read_bytes()
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}
    corpus_of(text, tmp_path / "a")
    assert written == {file: file.stat().st_mtime_ns for file in (tmp_path / "a").iterdir()}


def test_tokens_decode_to_the_text(tmp_path):
    from tokenizers import Tokenizer

    document = "naïve <|endoftext|> ünïcode\n" * 800
    (tmp_path / "text.txt").write_text(document, encoding="utf-8")
    corpus = corpus_of(tmp_path / "text.txt", tmp_path / "out")
    (file,) = (tmp_path / "out").glob("tokenizer-*.json")
    tokenizer = Tokenizer.from_file(str(file))
    stream = torch.cat([corpus.train, corpus.held_out]).tolist()
    end = tokenizer.token_to_id("<|endoftext|>")
    assert stream.count(end) == 1 and stream[-1] == end, "the marker inside the text is plain text"
    assert tokenizer.decode(stream[:-1], skip_special_tokens=False) == document


def test_ranks_share_out_the_batch_and_the_held_out_text(text, tmp_path):
    corpus = corpus_of(text, tmp_path)
    whole = corpus.batch(7, seed=3, batch=4, seq=32, rank=0, ranks=1)
    parts = [corpus.batch(7, seed=3, batch=4, seq=32, rank=rank, ranks=2) for rank in range(2)]
    assert torch.equal(torch.cat(parts), whole) and whole.shape == (4, 33)
    assert not torch.equal(whole, corpus.batch(8, seed=3, batch=4, seq=32, rank=0, ranks=1))
    assert not torch.equal(whole, corpus.batch(7, seed=4, batch=4, seq=32, rank=0, ranks=1))
    held_out = corpus.held_out_batches(tokens=512, batch=4, seq=32, rank=0, ranks=1)
    assert torch.equal(torch.cat(held_out)[:, :-1].flatten(), corpus.held_out[:512].long())


def test_unigram_entropy_is_that_of_the_targets(text, tmp_path):
    corpus = corpus_of(text, tmp_path)
    targets = corpus.held_out[1:513].tolist()
    shares = torch.tensor([targets.count(token) / 512 for token in set(targets)], dtype=torch.float64)
    expected = -(shares * shares.log()).sum().item()
    assert corpus.unigram_entropy(tokens=512, batch=4, seq=32) == pytest.approx(expected, rel=1e-12)


def cut_short(tokens, tokenizer):
    tokens.write_bytes(tokens.read_bytes()[:100])


def flip_a_bit(tokens, tokenizer):
    data = bytearray(tokens.read_bytes())
    data[-5] ^= 1
    tokens.write_bytes(data)


def other_tokens(tokens, tokenizer):
    save_file({"tokens": torch.zeros(5000, dtype=torch.int32)}, tokens)


def another_name(tokens, tokenizer):
    save_file({"words": torch.zeros(5000, dtype=torch.int32)}, tokens)


def another_dtype(tokens, tokenizer):
    save_file({"tokens": torch.zeros(5000)}, tokens)


def another_tokenizer(tokens, tokenizer):
    tokenizer.write_text(tokenizer.read_text().replace("a", "b", 1))


def no_tokenizer(tokens, tokenizer):
    tokenizer.unlink()


@pytest.mark.parametrize(
    "damage", [cut_short, flip_a_bit, other_tokens, another_name, another_dtype, another_tokenizer, no_tokenizer]
)
def test_a_damaged_cache_is_made_again(damage, text, tmp_path):
    first = corpus_of(text, tmp_path)
    (tokens,), (tokenizer,) = tmp_path.glob("tokens-*"), tmp_path.glob("tokenizer-*")
    before = tokens.read_bytes(), tokenizer.read_bytes()
    damage(tokens, tokenizer)
    again = corpus_of(text, tmp_path)
    assert torch.equal(again.train, first.train) and torch.equal(again.held_out, first.held_out)
    assert tokens.read_bytes()[-4000:] == before[0][-4000:] and tokenizer.read_bytes() == before[1]


def test_a_special_file_in_the_caches_place_is_not_replaced(text, tmp_path):
    corpus_of(text, tmp_path)
    (tokens,) = tmp_path.glob("tokens-*")
    tokens.unlink()
    os.mkfifo(tokens)
    with pytest.raises(OSError, match="egular file"):
        corpus_of(text, tmp_path)
    assert tokens.is_fifo()


LETTERS = "".join(chr(97 + 7 * n * n % 11) for n in range(200_000))
ENDLESS = {
    "one letter": "a" * 400_000,
    "letters": LETTERS,
    "blanks": " " * 400_000,
    "signs": "=" * 400_000,
    "a word of another alphabet": "\N{GREEK SMALL LETTER ALPHA}" * 200_000,
    "lines": "\n" * 400_000,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_text_without_words_is_cut_into_pieces(kind, tmp_path):
    """Pieces of any length took minutes: 10 s for 100,000 letters, and four times that for twice as many."""
    from tokenizers import Tokenizer

    (tmp_path / "text.txt").write_text(ENDLESS[kind] + "".join(f" word {n}" for n in range(2000)), encoding="utf-8")
    before = time.process_time()
    corpus = corpus_of(tmp_path / "text.txt", tmp_path / "out")
    assert time.process_time() - before < 20, "CPU time, which a busy machine does not change"
    (file,) = (tmp_path / "out").glob("tokenizer-*.json")
    stream = torch.cat([corpus.train, corpus.held_out]).tolist()
    assert Tokenizer.from_file(str(file)).decode(stream[:-1]) == (tmp_path / "text.txt").read_text(encoding="utf-8")


def test_a_long_training_is_not_silent(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SAY_EVERY_S", 0.02)
    with progress.saying("training a tokenizer"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2 and all(line.startswith("training a tokenizer: ") for line in lines)
    with pytest.raises(ConfigError), progress.saying("quick"):
        raise ConfigError("x", 1, "2")
    assert not capsys.readouterr().err


def test_too_much_text_and_special_files_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 600)
    (tmp_path / "b.txt").write_text("y" * 600)
    os.mkfifo(tmp_path / "c.txt")  # not looked at
    assert len(find_documents(str(tmp_path))[0]) == 2
    monkeypatch.setattr(text_module, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="at most 1000 bytes"):
        find_documents(str(tmp_path))
    for bad in (str(tmp_path / "c.txt"), "", "a\0b"):
        with pytest.raises(ConfigError, match="--text"):
            find_documents(bad)


def test_too_little_text_is_refused_before_the_tokenizer_is_trained(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a few words " * 10)
    monkeypatch.setattr(text_module, "_train_and_encode", lambda *_: pytest.fail("trained"))
    with pytest.raises(ConfigError, match="at least .* tokens of text"):
        corpus_of(tmp_path / "text.txt", tmp_path / "out")
