"""The text of the job: found, cut into tokens, shared out."""

import pytest
import torch

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
    (cached,) = (tmp_path / "a").glob("tokens-*")
    cached.write_bytes(cached.read_bytes()[:100])
    assert torch.equal(corpus_of(text, tmp_path / "a").train, first.train), "a damaged cache is made again"


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
