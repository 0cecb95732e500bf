"""`--sample`: a text drawn from the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from moe_overlap import aux_loss
from moe_overlap.commands.train.model import LanguageModel
from moe_overlap.commands.train.options import TrainOptions
from moe_overlap.commands.train.seeds import generator
from moe_overlap.commands.train.text import END_OF_DOCUMENT, Corpus, tokenizer_of

TEMPERATURE = 0.8


@torch.no_grad()
def sample(model: LanguageModel, options: TrainOptions, corpus: Corpus) -> str:
    """--sample tokens, from the beginning of a document on; a blank line stands between documents. Collective: every
    rank draws as many, by its own logits, which differ by rounding at most, and from one seed.

    Each token is drawn by softmax(logits / TEMPERATURE), from the last --seq tokens before it, all of which are
    computed again: these models have no cache of keys and values.
    """
    from tokenizers import Tokenizer

    model.eval()
    tokenizer = Tokenizer.from_file(str(tokenizer_of(Path(options.out), corpus.key)))
    drawing = generator("sample", options.seed)
    end: Any = tokenizer.token_to_id(END_OF_DOCUMENT)  # the tokenizer was made with it
    tokens: list[int] = [end]
    for _ in range(options.sample):
        logits_V = model(torch.tensor([tokens[-options.seq :]]))[0, -1]
        aux_loss(model)
        tokens.append(int(torch.multinomial((logits_V.float() / TEMPERATURE).softmax(dim=0), 1, generator=drawing)))
    documents: list[list[int]] = [[]]
    for token in tokens[1:]:
        if token == end:
            documents.append([])
        else:
            documents[-1].append(token)
    return "\n\n".join(map(tokenizer.decode, documents))
