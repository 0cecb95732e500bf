"""Where the ops stand among the experts of a cut, and in which order its chunks are taken: the inside of the search.

For one chunk order a dynamic programme over (chunks done, ops done) keeps every pair (compute time, wire time) that no
other beats in both, which is exact: both times only grow with what they started from.

The chunk order matters where chunks differ. Up to 4 chunks all orders are tried. Beyond that, Johnson's rule for two
machines ("Optimal two- and three-stage production schedules with setup times included", 1954) on three pairs of
durations gives a few to begin with, others go by the chunks' total: shortest first, longest first, and the longest in
the middle. Taking a chunk out and putting it in elsewhere improves the best of them: a heuristic, within 0.1 % of the
best known order on average (tests/planning/test_search_orders.py). Deduplicated steps
take their chunks in their own order: a row arrives with the first group of experts that needs it and leaves with the
last, and chunks of tokens are alike. So do those with experts in host memory, whose weights come up in one order; there
a chunk counts as having arrived when both its rows and its weights would have, each on a lane without the other.

Durations here are at one speed per lane, full or slowed; what is found is simulated by the caller.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

from moe_overlap.planning.window import Chunking, Slowdown, Window

# How many interleavings are handed on.
KEPT = 4
# Up to so many chunks every order of them is tried; beyond, so many moves, divided by the number of chunks.
ALL_ORDERS = 4
MOVES = 640

Order = tuple[int, ...]
OpsBefore = tuple[int, ...]
# Compute-lane time, wire time, runs of ops so far, ops_before of the chunks done.
Label = tuple[float, float, int, OpsBefore]
# Seconds between head and tail, chunks out of turn, runs of ops, chunk_order, ops_before.
End = tuple[float, bool, int, Order, OpsBefore]


def best_interleavings(window: Window, chunking: Chunking, factor: Slowdown) -> list[tuple[Order, OpsBefore]]:
    """The best (chunk_order, ops_before), best first, when every duration of a lane is multiplied by its factor."""
    in_turn = window.deduplicated or window.in_host_memory
    if window.in_host_memory:
        chunking = replace(chunking, first_s=tuple(map(max, chunking.first_s, chunking.fetch_s)))
    orders = [tuple(range(chunking.chunks))] if in_turn else _chunk_orders(chunking)
    ends = [end for order in orders for end in _ends(window, chunking, factor, order)]
    if not in_turn and chunking.chunks > ALL_ORDERS and not _equal_chunks(chunking):
        ends += _after_moves(window, chunking, factor, min(ends))
    return [(chunk_order, ops_before) for _, _, _, chunk_order, ops_before in sorted(ends)[:KEPT]]


def metadata_of(window: Window) -> tuple[list[float], list[float]]:
    """Seconds of the exchanges in front of the first one and in front of the last one: M, Mt, or nothing."""
    seconds = [] if window.metadata_s is None else [window.metadata_s]
    return (seconds, []) if window.phase == "forward" else ([], seconds)


def _equal_chunks(chunking: Chunking) -> bool:
    return len(set(zip(chunking.first_s, chunking.experts_s, chunking.second_s, strict=True))) == 1


def _chunk_orders(chunking: Chunking) -> list[Order]:
    """The orders of the chunks to begin with, their own first."""
    in_turn = tuple(range(chunking.chunks))
    if _equal_chunks(chunking):
        return [in_turn]
    if chunking.chunks <= ALL_ORDERS:
        return list(permutations(in_turn))
    durations_s = list(zip(chunking.first_s, chunking.experts_s, chunking.second_s, strict=True))
    orders = [
        in_turn,
        _johnson([(first_s, experts_s) for first_s, experts_s, _ in durations_s]),
        _johnson([(experts_s, second_s) for _, experts_s, second_s in durations_s]),
        _johnson([(first_s + experts_s, experts_s + second_s) for first_s, experts_s, second_s in durations_s]),
        *_by_total([first_s + experts_s + second_s for first_s, experts_s, second_s in durations_s]),
    ]
    return list(dict.fromkeys(orders))


def _by_total(totals_s: list[float]) -> tuple[Order, Order, Order]:
    """Shortest first, longest first, and both ends towards the longest in the middle."""
    jobs = range(len(totals_s))
    rising = tuple(sorted(jobs, key=lambda job: (totals_s[job], job)))
    falling = tuple(sorted(jobs, key=lambda job: (-totals_s[job], job)))
    return rising, falling, rising[::2] + rising[1::2][::-1]


def _johnson(stages_s: list[tuple[float, float]]) -> Order:
    """Johnson's rule for jobs with two stages: those with the shorter first stage, shortest first stage first, then the
    others, longest second stage first."""

    def rank(job: int) -> tuple[bool, float, int]:
        before_s, after_s = stages_s[job]
        return (False, before_s, job) if before_s < after_s else (True, -after_s, job)

    return tuple(sorted(range(len(stages_s)), key=rank))


def _after_moves(window: Window, chunking: Chunking, factor: Slowdown, best: End) -> list[End]:
    """What is met on the way from the best order by moves of one chunk, near ones first, each kept if it helps."""
    best_s, order = best[0], list(best[3])
    found: list[End] = []
    left = MOVES // chunking.chunks
    improved = True
    while improved:
        improved = False
        for source, target in _moves(len(order)):
            if left == 0:
                return found
            left -= 1
            order.insert(target, order.pop(source))
            ends = _ends(window, chunking, factor, tuple(order))
            found += ends
            moved_s = min(end[0] for end in ends)
            if moved_s < best_s:
                best_s, improved = moved_s, True
            else:
                order.insert(source, order.pop(target))
    return found


def _moves(chunks: int) -> list[tuple[int, int]]:
    """(from where, to where) of every move of one chunk; to the next place it is the same both ways."""
    found = []
    for distance in range(1, chunks):
        for i in range(chunks - distance):
            found += [(i, i + distance)] if distance == 1 else [(i, i + distance), (i + distance, i)]
    return found


def _ends(window: Window, chunking: Chunking, factor: Slowdown, chunk_order: Order) -> list[End]:
    """The dynamic programme for one order of the chunks: every unbeaten end."""
    issue_s, num_ops = window.issue_s * factor.compute, len(window.ops_s)
    ahead_s, last_s = ([one * factor.wire for one in part] for part in metadata_of(window))
    comp_s = wire_s = 0.0
    arrived_s = []
    ahead_at_s = []
    for exchange_s in ahead_s:
        comp_s += issue_s
        wire_s = max(wire_s, comp_s) + exchange_s
        ahead_at_s.append(wire_s)
    for chunk in chunk_order:
        comp_s += issue_s
        wire_s = max(wire_s, comp_s) + chunking.first_s[chunk] * factor.wire
        arrived_s.append(wire_s)
    labels: list[list[Label]] = [[] for _ in range(num_ops + 1)]  # by ops done
    labels[0] = [(comp_s, wire_s, 0, ())]
    for place, (chunk, arrival_s) in enumerate(zip(chunk_order, arrived_s, strict=True)):
        # M is waited for before the first experts; Mt is started after the last ones.
        waited_s = ahead_at_s if place == 0 else []
        between_s = last_s if place == len(chunk_order) - 1 else []
        for op, op_s in enumerate(window.ops_s):
            later = [(at_s + op_s * factor.compute, *rest) for at_s, *rest in labels[op]]
            labels[op + 1] = _unbeaten([*labels[op + 1], *later])  # type: ignore[list-item]
        experts_s, second_s = chunking.experts_s[chunk] * factor.compute, chunking.second_s[chunk] * factor.wire
        for done in range(num_ops + 1):
            after: list[Label] = []
            for comp_s, wire_s, runs, before in labels[done]:
                for at_s in waited_s:
                    comp_s = max(comp_s, at_s) + issue_s
                end_s = max(comp_s, arrival_s) + issue_s + experts_s
                for exchange_s in between_s:
                    end_s += issue_s
                    wire_s = max(wire_s, end_s) + exchange_s
                end_s += issue_s
                started = done > (before[-1] if before else 0)
                after.append((end_s, max(wire_s, end_s) + second_s, runs + started, (*before, done)))
            labels[done] = _unbeaten(after)
    out_of_turn = list(chunk_order) != sorted(chunk_order)
    ends: list[End] = []
    for done in range(num_ops + 1):
        for comp_s, wire_s, runs, before in labels[done]:
            for left_s in (*window.ops_s[done:], *chunking.deferred_s):
                comp_s += left_s * factor.compute
            # Then a wait for each second exchange, all but the last of them mostly while that one is under way.
            end_s = max(comp_s + (chunking.chunks + len(last_s)) * issue_s, wire_s + issue_s)
            ends.append((end_s, out_of_turn, runs + (done < num_ops), chunk_order, before))
    return ends


def _unbeaten(labels: list[Label]) -> list[Label]:
    """Those for which no other is as early or earlier on both lanes."""
    kept: list[Label] = []
    for label in sorted(labels):
        if not kept or label[1] < kept[-1][1]:
            kept.append(label)
    return kept
