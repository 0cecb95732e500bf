from collections.abc import Sequence

def simulate(
    lane_of_action: Sequence[int], duration_s: Sequence[float], deps: Sequence[Sequence[int]]
) -> list[tuple[float, float]]: ...
