"""Who closes a transport, and who leaves it open."""

from __future__ import annotations

import pytest
from torch.utils.checkpoint import _StopRecomputationError

from moe_overlap.errors import PlanMismatch, TransportClosed, TransportTimeout
from moe_overlap.transport import LocalTransport
from moe_overlap.transport.closing import closing_on_error
from tests.transport.worlds import header


@pytest.mark.parametrize("error", [ValueError("expert 5"), KeyboardInterrupt()])
def test_an_error_of_ones_own_closes(error: BaseException) -> None:
    transport = LocalTransport()
    with pytest.raises(type(error)), closing_on_error(transport, "E0"):
        raise error
    with pytest.raises(TransportClosed, match=f"rank 0, E0: {type(error).__name__}: {error}"):
        transport.open(header(2))


@pytest.mark.parametrize("error", [PlanMismatch("they differ"), TransportTimeout("late"), _StopRecomputationError()])
def test_what_comes_from_elsewhere_does_not(error: BaseException) -> None:
    transport = LocalTransport()
    with pytest.raises(type(error)) as caught, closing_on_error(transport, "E0"):
        raise error
    assert caught.value is error and transport.open(header(2))


def test_a_timeout_says_the_hint_too() -> None:
    late = TransportTimeout("late", rank=1, peer=2, step=3, chunk=4, action="Dt4", seconds=5.0)
    with pytest.raises(TransportTimeout, match="^late; look there") as caught:
        with closing_on_error(LocalTransport(), "Dt4", hint="look there"):
            raise late
    assert caught.value.__cause__ is late
    assert {**vars(caught.value), "message": ""} == {**vars(late), "message": ""}
