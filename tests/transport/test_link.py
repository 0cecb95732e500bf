"""Link strings and node topologies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_overlap.errors import ConfigError
from moe_overlap.transport.link import LinkSpec, NodeTopology

GOOD = {
    "400mbit:50us": (50e6, 50e-6),
    "400MBIT:50US": (50e6, 50e-6),
    " 10gbit ": (1.25e9, 0.0),
    "25GB:2us": (25e9, 2e-6),
    "1.5MB:0.5ms": (1.5e6, 0.5e-3),
    "64kbit : 1s": (8e3, 1.0),
    "8kB:0s": (8e3, 0.0),
    "100mb/s:3ms": (100e6, 3e-3),
}
BAD = ["", "fast", "400", "400mbit:", "400mbit:50", "mbit:50us", "-1mbit", "1e3mbit", "0mbit", "1tbit", "1mbit:90s",
       "nan mbit", "infmbit", "400mbit:50us:3", "1mbit;50us", "٣mbit", "9" * 400 + "gbit", None, 400]  # fmt: skip


@pytest.mark.parametrize("text", GOOD)
def test_good_text(text: str) -> None:
    link = LinkSpec.parse(text)
    assert link is not None
    assert (link.bytes_per_s, link.latency_s) == pytest.approx(GOOD[text], rel=1e-12)
    assert LinkSpec.parse(str(link)) == link


def test_none_is_no_link_and_text_is_canonical() -> None:
    assert LinkSpec.parse("none") is None and LinkSpec.parse("NONE") is None
    assert str(LinkSpec.parse("0.4gbit:50us")) == "400mbit:50us"
    assert str(LinkSpec.parse("25GB:2000us")) == "200gbit:2ms"
    assert str(LinkSpec.parse("1kB")) == "8kbit:0us"
    assert LinkSpec(bytes_per_s=50e6, latency_s=50e-6).seconds(4_000_000) == pytest.approx(0.08005)


@pytest.mark.parametrize("text", BAD)
def test_bad_text_is_named(text: object) -> None:
    with pytest.raises(ConfigError) as caught:
        LinkSpec.parse(text)  # type: ignore[arg-type]
    assert caught.value.field == "link"
    assert any(word in str(caught.value) for word in ("400mbit:50us", "a rate from", "a latency from"))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.floats(1.0, 1e15), st.floats(0.0, 60.0))
def test_round_trip(bytes_per_s: float, latency_s: float) -> None:
    link = LinkSpec(bytes_per_s=bytes_per_s, latency_s=latency_s)
    again = LinkSpec.parse(str(link))
    assert again is not None
    assert (again.bytes_per_s, again.latency_s) == pytest.approx((bytes_per_s, latency_s), rel=1e-11, abs=1e-12)
    assert str(again) == str(link)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=20))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        link = LinkSpec.parse(text)
    except ConfigError:
        return
    assert link is None or link.bytes_per_s >= 1


def test_topology() -> None:
    topology = NodeTopology(world_size=8, ranks_per_node=2)
    assert topology.nodes == 4
    assert [topology.node_of(rank) for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert topology.off_node(3) == (0, 1, 4, 5, 6, 7)
    assert NodeTopology(world_size=2, ranks_per_node=2).off_node(0) == ()
    for world, per_node in ((4, 3), (4, 0), (0, 1), (4, 8), (4, True)):
        with pytest.raises(ConfigError):
            NodeTopology(world_size=world, ranks_per_node=per_node)
