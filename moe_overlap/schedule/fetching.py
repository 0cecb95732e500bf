"""Where the weights of copies of experts are fetched in a forward schedule."""

from __future__ import annotations

from moe_overlap.schedule.actions import Action, Schedule


def fetching(forward: Schedule, groups: int) -> Schedule:
    """A forward schedule that fetches weights, in no group (all copies are valid), one, or two.

    Wf0 stands where the counts are known: ahead of the rows on the wire, which is one behind the other, so that the
    experts of the first chunk need not wait for all chunks; in a shortcut's window both are under the backbone's ops.
    Wf1 begins when Wf0 has been waited for: right behind P, or, where several of the user's ops stand before the first
    experts, in their middle, so that one part hides Wf0 and the other Wf1.
    """
    found = list(forward)
    if groups > 1:
        begin = found.index(Action("P"))
        until = next(place for place, action in enumerate(found) if action.verb in ("O", "E"))
        ops = [place for place in range(begin, until) if found[place].verb in ("B", "S")]
        behind = ops[len(ops) // 2 - 1] if len(ops) > 1 else begin
        found.insert(behind + 1, Action("Wf", 1))
    if groups:
        found.insert(found.index(Action("P")), Action("Wf", 0))
    return Schedule(tuple(found))
