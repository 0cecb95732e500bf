"""The control plane's questions to the key-value store: how long they may take, and when."""

from __future__ import annotations

import time

import pytest

from moe_overlap.errors import PeerFailed
from moe_overlap.transport import control
from moe_overlap.transport.control import ControlPlane, identity
from moe_overlap.transport.where import Where


class SlowStore:
    """A store with one peer's entry, that takes `delay_s` for every answer."""

    def __init__(self, delay_s):
        self.delay_s = delay_s
        self.entries = {"0/who/1": control.SEPARATOR.join(map(str, identity())).encode()}

    def set(self, key, text):
        time.sleep(self.delay_s)
        self.entries[key] = text.encode()

    def check(self, keys):
        time.sleep(self.delay_s)
        return all(key in self.entries for key in keys)

    def get(self, key):
        time.sleep(self.delay_s)
        return self.entries[key]


def test_a_busy_store_may_take_the_whole_limit_while_ranks_meet(monkeypatch):
    monkeypatch.setattr(control, "ASK_LIMIT_S", 0.001)
    store = SlowStore(0.1)
    plane = ControlPlane(store, rank=0, world_size=2)
    assert plane.meet(0, 60.0) == 0
    assert plane.suspects() == [] and plane.lost is None
    plane.report(1, Where("D0"))  # beside a wait it may not
    assert plane.lost == "no answer within 0.001 s"


def test_a_store_that_never_answers_is_lost_at_the_limit(monkeypatch):
    monkeypatch.setattr(control, "ASK_LIMIT_S", 0.001)
    plane = ControlPlane(SlowStore(60.0), rank=0, world_size=2)
    begin_s = time.monotonic()
    with pytest.raises(PeerFailed, match="store of torch.distributed is lost"):
        plane.meet(0, 0.2)
    assert time.monotonic() - begin_s < 100
