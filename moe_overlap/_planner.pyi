from collections.abc import Mapping, Sequence

def simulate(
    lane_of_action: Sequence[int],
    duration_s: Sequence[float],
    deps: Sequence[Sequence[int]],
    slowdown: Mapping[int, float] = ...,
) -> list[tuple[float, float]]: ...
