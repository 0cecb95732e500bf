from collections.abc import Mapping, Sequence

import numpy as np

def simulate(
    lane_of_action: Sequence[int],
    duration_s: Sequence[float],
    deps: Sequence[Sequence[int]],
    slowdown: Mapping[int, float] = ...,
) -> list[tuple[float, float]]: ...

class Cut:
    def __init__(
        self,
        head_s: float,
        tail_s: float,
        issue_s: float,
        compute_slowdown: float,
        wire_slowdown: float,
        ops_s: Sequence[float],
        first_s: Sequence[float],
        experts_s: Sequence[float],
        second_s: Sequence[float],
        deferred_s: Sequence[float],
        ahead_s: Sequence[float] = ...,
        last_s: Sequence[float] = ...,
        fetch_s: Sequence[float] = ...,
        return_s: Sequence[float] = ...,
    ) -> None: ...

def search(
    cuts: Sequence[tuple[Cut, bool, bool]], limit: int = ...
) -> list[list[tuple[float, bool, list[int], list[int]]]]: ...
def makespan_s(cut: Cut, chunk_order: Sequence[int], ops_before: Sequence[int], joined: bool) -> float: ...
def decide_replication(
    counts: np.ndarray,
    ranks_per_node: int,
    seats: tuple[tuple[int, int, int], ...],
    spare: Sequence[int],
    refetched: bool,
    phases: Sequence[tuple[float, ...]],
    most_copies: int,
    margin: float,
) -> tuple[float, float, bool, tuple[tuple[int, int, int], ...], bool]: ...
def split_rows(counts: np.ndarray, seats: tuple[tuple[int, int, int], ...], ranks_per_node: int) -> np.ndarray: ...
def eplb(
    loads: Sequence[Sequence[float]],
    slots: Sequence[int],
    homes: Sequence[int],
    nodes: int,
    groups: int,
    distinct: bool,
) -> list[list[int]]: ...
def proportional(
    loads: Sequence[Sequence[float]], slots: Sequence[int], homes: Sequence[int], contiguous: bool
) -> list[list[int]]: ...
def assign(cost: Sequence[Sequence[int]]) -> list[int]: ...
