"""`--text-by domain`: text that differs from node to node, as where each site trains on what lies there.

A document's domain is the folder it lies in. Folders, in the order of their names, are cut into as many stretches as
there are nodes, of about as many tokens each, at the end of a document. Inside its stretch a node has everything as
`--text-by even` has it in the whole: documents in the order of their hashes, held-out text at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_overlap.commands.train.seeds import generator
from moe_overlap.commands.train.text import HELD_OUT_SHARE, Corpus, windows
from moe_overlap.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DomainCorpus(Corpus):
    """One corpus for each node; `train` and `held_out` are all of them, in order. Ranks in a row share a node."""

    nodes: tuple[Corpus, ...]

    def batch(self, step: int, *, seed: int, batch: int, seq: int, rank: int, ranks: int) -> torch.Tensor:
        """int64 [batch / ranks, seq + 1] of the text of this rank's node; depends on (seed, step, node)."""
        node = rank * len(self.nodes) // ranks
        stream = self.nodes[node].train
        starts = torch.randint(0, len(stream) - seq, (batch,), generator=generator("batch", seed, step, node))
        return windows(stream, starts.chunk(ranks)[rank], seq)

    def held_out_batches(self, *, tokens: int, batch: int, seq: int, rank: int, ranks: int) -> list[torch.Tensor]:
        """This rank's batches of its node's held-out text, as many on every rank; with one rank, those of all nodes."""
        count = len(self.nodes)
        shortest = min(len(node.held_out) for node in self.nodes)
        num_batches = max(1, min(tokens, count * (shortest - 1)) // (batch * seq))
        starts = torch.arange(num_batches * batch // count) * seq
        if ranks == 1:
            return [windows(node.held_out, starts, seq) for node in self.nodes]
        held_out, local = self.nodes[rank * count // ranks].held_out, ranks // count
        return [windows(held_out, rows.chunk(local)[rank % local], seq) for rows in starts.split(batch // count)]


def split_by_domain(corpus: Corpus, folders: Sequence[str], nodes: int, *, batch: int, seq: int) -> DomainCorpus:
    """The corpus cut for so many nodes by the folder of each of its documents, which are given in their order.

    ConfigError where a node's held-out text would be too short for its share of one batch.
    """
    stream = torch.cat([corpus.train, corpus.held_out])
    ends = (stream == stream[-1]).nonzero().flatten() + 1
    documents = torch.tensor_split(stream, ends[:-1])
    assert len(documents) == len(folders)
    by_folder = sorted(range(len(documents)), key=lambda i: folders[i])  # stable: by hash inside a folder
    node_of, before = {}, 0
    for i in by_folder:
        node_of[i] = min(nodes - 1, (before + len(documents[i]) // 2) * nodes // len(stream))
        before += len(documents[i])
    parts = [[documents[i] for i in range(len(documents)) if node_of[i] == node] for node in range(nodes)]
    each = [_cut(corpus, torch.cat(part) if part else stream[:0]) for part in parts]
    needed = batch // nodes * seq + 1
    for node, one in enumerate(each):
        if len(one.held_out) < needed or len(one.train) <= seq:
            expected = f"text with at least {math.ceil(needed / HELD_OUT_SHARE)} tokens for each of {nodes} nodes"
            raise ConfigError("--text-by", f"domain ({len(one.train)} tokens on node {node})", expected)
    return DomainCorpus(train=torch.cat([one.train for one in each]), nodes=tuple(each), vocab=corpus.vocab,
                        held_out=torch.cat([one.held_out for one in each]), key=corpus.key,
                        source=corpus.source)  # fmt: skip


def _cut(like: Corpus, stream: torch.Tensor) -> Corpus:
    split = len(stream) - math.ceil(len(stream) * HELD_OUT_SHARE)
    return Corpus(train=stream[:split], held_out=stream[split:], vocab=like.vocab, key=like.key, source=like.source)
