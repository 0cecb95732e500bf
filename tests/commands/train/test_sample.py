"""`train --sample`: a text of the trained model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from moe_overlap import ConfigError
from moe_overlap.commands.train import sample as sampling
from moe_overlap.commands.train.options import parse
from tests.commands.train.jobs import SMALL, corpus_of, run, run_on_two


def test_the_command_writes_a_text_and_writes_it_again(text, tmp_path, capsys):
    assert run(text, tmp_path, "--steps", 2, "--ranks", 1, "--checkpoint-every", 2, "--sample", 40) == 0
    first = capsys.readouterr().out
    assert len(first.strip()) > 20
    again = ("--steps", 2, "--ranks", 1, "--resume", tmp_path, "--sample", 40)
    assert run(text, tmp_path, *again) == 0
    assert capsys.readouterr().out == first, "the model of the checkpoint, and no step was left"


def test_two_ranks_draw_together(text, tmp_path):
    """Each draw is collective, and longer than the window of the model."""
    assert run_on_two(text, tmp_path, "--steps", 1, "--sample", 36, "--eval-tokens", 128) == [0, 0]


class Next(torch.nn.Module):
    """A model that says for certain which token comes after the last one, and what it was asked."""

    def __init__(self, after):
        super().__init__()
        self.after, self.asked = after, []

    def forward(self, tokens):
        self.asked.append(tokens[0].tolist())
        return 1e4 * F.one_hot(torch.tensor([[self.after(tokens[0, -1].item())]]), SMALL.vocab).float()


def test_what_is_drawn(text, tmp_path):
    """A document ends with its token; the window is the last --seq tokens."""
    from tokenizers import Tokenizer

    corpus = corpus_of(text, tmp_path)
    tokenizer = Tokenizer.from_file(str(sampling.tokenizer_of(tmp_path, corpus.key)))
    end, a, b = (tokenizer.token_to_id(word) for word in (sampling.END_OF_DOCUMENT, "a", "b"))
    model = Next(lambda last: {end: a, a: b, b: end}[last])
    options = SimpleNamespace(out=str(tmp_path), seed=0, sample=5, seq=2)
    assert sampling.sample(model, options, corpus) == "ab\n\nab"
    assert model.asked[0] == [end] and model.asked[3] == [b, end]


def test_it_is_no_negative_number(tmp_path):
    with pytest.raises(ConfigError, match="--sample"):
        parse(["--sample", "-1", "--out", str(tmp_path)])
