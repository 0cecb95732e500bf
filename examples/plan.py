"""Which order of one layer is fastest, from times alone: nothing runs, no rank is needed. python examples/plan.py"""

from moe_overlap.auto.planned import pair_of
from moe_overlap.planning.search import search
from moe_overlap.planning.window import Chunking, Window
from moe_overlap.schedule.words import python_of

MS = 1e-3


def forward(chunks: int) -> Chunking:
    """An exchange takes 8 ms and the experts 6 ms, cut into equal chunks, each of which costs 0.2 ms more."""
    exchange, experts = (8 * MS / chunks + 0.2 * MS,) * chunks, (6 * MS / chunks,) * chunks
    return Chunking(chunks=chunks, by="tokens", first_s=exchange, second_s=exchange, experts_s=experts)


# Three ops of the model stand beside the exchanges: attention, MLP, attention.
window = Window(phase="forward", head_s=0.1 * MS, tail_s=0.1 * MS, ops_s=(4 * MS, 5 * MS, 4 * MS),
                chunkings=tuple(forward(chunks) for chunks in (1, 2, 4)))  # fmt: skip
best, *others = search(window)
serial = next(one for one in [best, *others] if one.joined and one.chunks == 1)
print(f"{best.order}: {best.predicted_s / MS:.1f} ms, {serial.predicted_s / best.predicted_s:.2f}x serial")
print(python_of(pair_of(best, None, num_ops=3, op_verb="B")))
