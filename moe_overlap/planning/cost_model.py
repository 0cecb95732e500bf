"""Seconds from integers: the models of one layer's exchanges and compute, and the window that the search gets.

Every part of a step has an alpha-beta model, seconds = alpha + beta * n (Hockney 1994; for exchanges and experts of a
MoE layer: FSMoE, ASPLOS'25, eq. 1). `auto/calibrate.py` fits them to measured times; `moe-overlap plan` makes them
from the figures of a machine. All times are those of the slowest rank, since a step ends with it.

    >>> AlphaBeta(alpha_s=1e-5, beta_s=1e-9)(1000)      # 10 us, and 1 ns for each of 1000 bytes
    1.1000000000000001e-05
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from moe_overlap.errors import ConfigError
from moe_overlap.planning.shapes import DistinctShape, StepShape
from moe_overlap.planning.window import Chunking, OpVerb, Slowdown, Window
from moe_overlap.schedule.actions import Phase

# The two kinds of wire: between ranks of different nodes, and of the same one.
WIRES = ("inter", "intra")

# Of seconds, or rows: what nothing real reaches. Sums, products and quotients of figures between still fit a float.
LEAST, MOST = 1e-30, 1e9
MOST_OPS, LONGEST_SOURCE = 256, 1000  # ops beside the exchanges, and characters, in a file


def _check_seconds(field: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (value == 0 or LEAST <= value <= MOST):  # type: ignore[operator]
        raise ConfigError(field, value, f"0, or a finite number from {LEAST:.0e} to {MOST:.0e}")


def figure(measured: float) -> float:
    """The nearest figure that a model may hold: a difference of measured times can be a rounding error below zero.

    >>> figure(-1.08e-19), figure(5e-324), figure(0.25), figure(float("nan"))
    (0.0, 0.0, 0.25, 0.0)
    """
    return min(measured, MOST) if measured >= LEAST else 0.0


@dataclass(frozen=True, kw_only=True)
class AlphaBeta:
    """seconds(n) = alpha_s + beta_s * n, and 0 for n = 0; the unit of n stands at the field that holds the model."""

    alpha_s: float
    beta_s: float

    def __post_init__(self) -> None:
        _check_seconds("alpha_s", self.alpha_s)
        _check_seconds("beta_s", self.beta_s)

    @classmethod
    def measured(cls, alpha_s: float, beta_s: float) -> AlphaBeta:
        """The model of two fitted figures, each the nearest that it may hold."""
        return cls(alpha_s=figure(alpha_s), beta_s=figure(beta_s))

    def __call__(self, n: float) -> float:
        return self.alpha_s + self.beta_s * n if n else 0.0

    @classmethod
    def fit(cls, points: Iterable[tuple[float, float]]) -> AlphaBeta:
        """The model of measured (n, seconds): least sum of |predicted - measured| / measured, alpha and beta >= 0.

        Relative errors, so that small sizes count as much as large ones; absolute values, so that one disturbed sample
        does not move the line. Such an optimum lies on a vertex: a line through two of the points, or through one with
        alpha or beta zero. All are tried. Raises ConfigError unless two different n > 0 have seconds > 0.
        """
        found = sorted((float(n), float(seconds)) for n, seconds in points)
        usable = all(0 < n < math.inf and 0 < seconds < math.inf for n, seconds in found)
        if not usable or len({n for n, _ in found}) < 2:
            raise ConfigError("points", found, "(n, seconds) above 0, with at least two different n")
        lines = [line for n, seconds in found for line in ((0.0, seconds / n), (seconds, 0.0))]
        for position, (n, seconds) in enumerate(found):
            for other_n, other_s in found[position + 1 :]:
                if other_n > n:
                    beta_s = (other_s - seconds) / (other_n - n)
                    lines.append((seconds - beta_s * n, beta_s))
        possible = [line for line in lines if min(line) >= 0]
        best = min(possible, key=lambda line: (sum(abs(line[0] + line[1] * n - s) / s for n, s in found), line))
        return cls.measured(*best)


@dataclass(frozen=True, kw_only=True)
class DistinctCosts:
    """Where a deduplicated step costs something else than `CostModel` says, by the names that it has there.

    Experts read their rows through a map, multiply by the router's weights and sum: over the rows that they compute,
    and for the rows that stay alike (O, Od). P and U make and use the maps. `outside_s` has what M and Mt take beside
    the wire. `inside`: of an exchange inside the nodes, over the bytes that leave or enter the busiest rank in it;
    it is waited for on the compute lane. `gateway_byte_s`: of a byte that gateways read or write beside it; 0 where
    what they do was measured, in `outside_s`.
    """

    experts: AlphaBeta
    experts_dgrad: AlphaBeta
    experts_wgrad: AlphaBeta
    permute: AlphaBeta
    unpermute: AlphaBeta
    unpermute_backward: AlphaBeta
    permute_backward: AlphaBeta
    expert_s: float = 0.0
    expert_dgrad_s: float = 0.0
    outside_s: float = 0.0
    outside_backward_s: float = 0.0
    inside: AlphaBeta = AlphaBeta(alpha_s=0.0, beta_s=0.0)
    gateway_byte_s: float = 0.0

    def __post_init__(self) -> None:
        for name in _names(DistinctCosts, "float"):
            _check_seconds(f"distinct.{name}", getattr(self, name))

    def to_json(self) -> dict[str, Any]:
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_json(cls, data: object) -> DistinctCosts:
        """ConfigError names a key that is missing, unknown, or holds something else; files older than `gateway_byte_s`
        have none."""
        data = {"gateway_byte_s": 0.0, **data} if isinstance(data, Mapping) else data
        given = dict(_object("distinct", data, [field.name for field in fields(cls)]))
        for name in _names(cls, "AlphaBeta"):
            given[name] = AlphaBeta(**_object(f"distinct.{name}", given[name], _LINE))
        return cls(**given)


@dataclass(frozen=True, kw_only=True)
class Hops:
    """Seconds of what stays inside the nodes, by chunk: of rows passed on to ranks, and of those back to a gateway."""

    out: tuple[float, ...]
    back: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """What each part of a step costs on the slowest rank, in seconds.

    `exchange`: by wire ("inter", "intra"), over the bytes that leave or enter the busiest rank on it in one exchange;
    an exchange ends with its slowest wire. `experts`, `experts_dgrad`, `experts_wgrad`: over the rows of the busiest
    rank in one chunk (wgrad: in one group), plus `expert_s` (`expert_dgrad_s`) for each expert that computes in it:
    chunks of tokens pass all experts, chunks by expert groups a few. `permute` .. `permute_backward`: over rows, T
    * K of a rank. `backbone_s`, `backbone_backward_s`: the ops beside the exchanges, both in forward order.
    `shared_s`: the shared expert of a layer. `misfit`: by what share the model is off for the worst of the steps that
    it was made from. `outside_s`: everything of the timed unit that is in no window
    (router, agreement, ops before the tap, the combination of the branches); `agree_s`: of it the agreement, when
    its last rank has come. `issue_s`: compute-lane time of starting an exchange, and again of waiting for it.
    `host_up`, `host_down`: of a copy to the device and back, over bytes, where experts are in the host's memory.
    `weights_hidden`: from 0 to 1, how much of the time that experts cost by themselves, which is mostly that of reading
    their weights, passes beside the matmuls of their rows: 1 makes the larger of both of their sum, as on GPUs.
    `slowdown`: of each lane while the other is busy. `distinct`: what differs in deduplicated steps; None: nobody
    knows. `source`: where the figures come from, in words.
    """

    exchange: Mapping[str, AlphaBeta]
    experts: AlphaBeta
    experts_dgrad: AlphaBeta
    experts_wgrad: AlphaBeta
    permute: AlphaBeta
    unpermute: AlphaBeta
    unpermute_backward: AlphaBeta
    permute_backward: AlphaBeta
    host_up: AlphaBeta = AlphaBeta(alpha_s=0.0, beta_s=0.0)
    host_down: AlphaBeta = AlphaBeta(alpha_s=0.0, beta_s=0.0)
    backbone_s: tuple[float, ...] = ()
    backbone_backward_s: tuple[float, ...] = ()
    expert_s: float = 0.0
    expert_dgrad_s: float = 0.0
    shared_s: float = 0.0
    shared_backward_s: float = 0.0
    misfit: float = 0.0
    outside_s: float = 0.0
    outside_backward_s: float = 0.0
    agree_s: float = 0.0
    measured_rows: float = 0.0
    issue_s: float = 0.0
    weights_hidden: float = 0.0
    slowdown: Slowdown = Slowdown()
    distinct: DistinctCosts | None = None
    source: str

    def __post_init__(self) -> None:
        if not set(self.exchange) <= set(WIRES):
            raise ConfigError("exchange", sorted(self.exchange), f"models of wires among {', '.join(WIRES)}")
        for name in _NUMBERS:
            _check_seconds(name, getattr(self, name))
        if self.weights_hidden > 1:
            raise ConfigError("weights_hidden", self.weights_hidden, "a share from 0 to 1")
        for name in _OPS:
            for seconds in getattr(self, name):
                _check_seconds(name, seconds)
        if len(self.backbone_s) != len(self.backbone_backward_s):
            raise ConfigError("backbone_backward_s", self.backbone_backward_s, f"{len(self.backbone_s)} times")

    @cached_property
    def deduplicated(self) -> CostModel:
        """The figures of deduplicated steps. ConfigError where there are none."""
        if self.distinct is None:
            raise ConfigError("distinct", None, "the figures of deduplicated steps")
        apart = ("inside", "gateway_byte_s")
        return replace(self, distinct=None, **{n: one for n, one in vars(self.distinct).items() if n not in apart})

    def inside_s(self, shape: StepShape, phase: Phase) -> tuple[float, ...]:
        """Seconds of the exchanges inside the nodes around the experts of each chunk, and of what gateways move in
        memory."""
        hops = self.hops_s(shape, phase)
        found = [out + back for out, back in zip(hops.out, hops.back, strict=True)]
        gateway = None if shape.distinct is None else shape.distinct.gateway
        if gateway is not None and gateway.moved and self.distinct is not None:
            byte_s = self.distinct.gateway_byte_s
            found = [one + byte_s * moved for one, moved in zip(found, gateway.moved, strict=True)]
        return tuple(found)

    def hops_s(self, shape: StepShape, phase: Phase) -> Hops:
        """Seconds of the exchanges inside the nodes, of each chunk; M with the first one, and Mt with the last."""
        inside = None if shape.distinct is None else shape.distinct.inside
        if inside is None or self.distinct is None:
            return Hops(out=(0.0,) * shape.chunks, back=(0.0,) * shape.chunks)
        line, forward = self.distinct.inside, phase == "forward"
        sizes = inside.narrow_out if forward and inside.narrow_out is not None else inside.out
        out, back = [line(size) for size in sizes], [line(size) for size in inside.back]
        if forward:
            out[0] += line(inside.metadata)
        else:
            back[-1] += line(inside.gradients)
        return Hops(out=tuple(out), back=tuple(back))

    def exchange_s(self, bytes_by_lane: Mapping[str, int]) -> float:
        """Seconds of one exchange of so many bytes on each wire. ConfigError for a wire without a model."""
        return max((self.wire(lane)(count) for lane, count in bytes_by_lane.items()), default=0.0)

    def wire(self, lane: str) -> AlphaBeta:
        """The model of one wire. ConfigError where there is none."""
        if lane not in self.exchange:
            raise ConfigError("bytes_by_lane", lane, f"wires of the model: {sorted(self.exchange)}")
        return self.exchange[lane]

    def outside(self, phase: Phase, num_ops: int | None = None, *, op_verb: OpVerb = "B", num_ahead: int = 0) -> float:
        """Seconds of the timed unit in no window, when the last `num_ops` backbone ops (None: all) are in it.

        num_ahead: the first so many of these (op_verb "S": the shared expert) run beside the agreement, in forward.
        """
        ops_s, rest_s = (
            (self.backbone_s, self.outside_s)
            if phase == "forward"
            else (self.backbone_backward_s, self.outside_backward_s)
        )
        before = len(ops_s) - _op_count(self, num_ops)
        if phase == "backward" or not num_ahead:
            return rest_s + sum(ops_s[:before])
        ahead_s = self.shared_s if op_verb == "S" else sum(ops_s[before : before + num_ahead])
        return rest_s + sum(ops_s[:before]) + max(0.0, ahead_s - self.agree_s)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists, dicts and the one text `source`: what `from_json` takes."""
        found: dict[str, Any] = {name: _plain(getattr(self, name)) for name in _AFFINE}
        found |= {name: getattr(self, name) for name in (*_NUMBERS, "source")}
        found |= {name: list(getattr(self, name)) for name in _OPS}
        found["exchange"] = {lane: _plain(line) for lane, line in self.exchange.items()}
        found["distinct"] = None if self.distinct is None else self.distinct.to_json()
        found["slowdown"] = {"compute": self.slowdown.compute, "wire": self.slowdown.wire}
        return {field.name: found[field.name] for field in fields(self)}

    @classmethod
    def from_json(cls, data: object) -> CostModel:
        """The model of `to_json`. ConfigError names a key that is missing, unknown, or holds something else."""
        given = _object("cost model", data, [field.name for field in fields(cls)])
        values: dict[str, Any] = {name: given[name] for name in _NUMBERS}
        values |= {name: AlphaBeta(**_object(name, given[name], _LINE)) for name in _AFFINE}
        for name in _OPS:
            if not isinstance(given[name], list):
                raise ConfigError(name, given[name], "a list of seconds")
            if len(given[name]) > MOST_OPS:
                raise ConfigError(name, f"{len(given[name])} ops", f"at most {MOST_OPS}")
            values[name] = tuple(given[name])
        if not isinstance(given["exchange"], Mapping):
            raise ConfigError("exchange", given["exchange"], "an object of wires")
        values["exchange"] = {
            lane: AlphaBeta(**_object(f"exchange.{lane}", line, _LINE)) for lane, line in given["exchange"].items()
        }
        values["slowdown"] = Slowdown(**_object("slowdown", given["slowdown"], ["compute", "wire"]))
        values["distinct"] = None if given["distinct"] is None else DistinctCosts.from_json(given["distinct"])
        source = given["source"]
        if not isinstance(source, str) or not source.isprintable() or len(source) > LONGEST_SOURCE:
            raise ConfigError("source", source, f"a text of one line, of at most {LONGEST_SOURCE} characters")
        return cls(source=source, **values)


def _names(cls: type, kind: str) -> tuple[str, ...]:
    """The fields of a model that are of one kind."""
    return tuple(field.name for field in fields(cls) if field.type == kind)


_LINE = ["alpha_s", "beta_s"]
_AFFINE, _NUMBERS, _OPS = (_names(CostModel, kind) for kind in ("AlphaBeta", "float", "tuple[float, ...]"))


def _plain(value: AlphaBeta | float) -> dict[str, float] | float:
    return {"alpha_s": value.alpha_s, "beta_s": value.beta_s} if isinstance(value, AlphaBeta) else value


def _object(name: str, value: object, keys: Sequence[str]) -> Mapping[str, Any]:
    """`value` where it is an object of exactly these keys."""
    if not isinstance(value, Mapping):
        raise ConfigError(name, value, "an object with the keys " + " ".join(keys))
    wrong = [f"no {key}" for key in keys if key not in value] + [f"{key} unknown" for key in value if key not in keys]
    if wrong:
        raise ConfigError(name, ", ".join(wrong), "the keys " + " ".join(keys))
    return value


def window(
    model: CostModel,
    shapes: Sequence[StepShape],
    phase: Phase,
    *,
    op_verb: OpVerb = "B",
    num_ops: int | None = None,
    weight_groups: int = 1,
) -> Window:
    """The search's problem for one phase of one layer call: a duration for every action, for every chunking.

    `shapes`: one of each chunking to consider, all of one step, deduplicated all of them or none. op_verb "B": the
    model's last `num_ops` backbone ops (None: all) run beside the exchanges; "S": the shared expert does.
    `weight_groups`: into how many equal groups the weight gradient is cut in backward.
    """
    if not shapes or len({(shape.slots_rows, shape.distinct is None) for shape in shapes}) != 1:
        raise ConfigError("shapes", [shape.slots_rows for shape in shapes], "at least one, all of the same step")
    forward, distinct = phase == "forward", shapes[0].distinct
    inside_s = [model.inside_s(shape, phase) for shape in shapes]
    model = model if distinct is None else model.deduplicated
    if op_verb == "S":
        ops_s: tuple[float, ...] = (model.shared_s if forward else model.shared_backward_s,)
    else:
        ops_s = model.backbone_s if forward else model.backbone_backward_s
        ops_s = ops_s[len(ops_s) - _op_count(model, num_ops) :]
    slots_rows = shapes[0].slots_rows
    if model.measured_rows:
        ops_s = tuple(seconds * slots_rows / model.measured_rows for seconds in ops_s)
    ops_s = ops_s if forward else ops_s[::-1]
    metadata_s: float | None = None
    halves_s: tuple[float, float] | None = None
    if distinct is not None:
        ops_s = (_experts_s(model, phase, distinct.own_rows, distinct.own_experts), *ops_s)
        metadata_s = model.exchange_s(distinct.metadata_by_lane if forward else distinct.gradients_by_lane)
        halves_s = _halves_s(model, distinct) if forward else None
    return Window(
        phase=phase,
        op_verb=op_verb,
        head_s=(model.permute if forward else model.unpermute_backward)(slots_rows),
        tail_s=(model.unpermute if forward else model.permute_backward)(slots_rows),
        ops_s=ops_s,
        metadata_s=metadata_s,
        halves_s=halves_s,
        issue_s=model.issue_s,
        slowdown=model.slowdown,
        chunkings=tuple(
            _chunking(model, shape, phase, weight_groups, beside_s)
            for shape, beside_s in zip(shapes, inside_s, strict=True)
        ),
    )


def _chunking(
    model: CostModel, shape: StepShape, phase: Phase, weight_groups: int, inside_s: Sequence[float]
) -> Chunking:
    """inside_s: what the compute lane does for each chunk beside its experts."""
    distinct, narrow = shape.distinct, shape.narrow_by_lane if phase == "forward" else None
    # The busiest rank may be another one in each chunk; the sum over chunks is then an upper bound of any rank's rows.
    all_rows = sum(shape.rows) + (0 if distinct is None else distinct.own_rows)
    # Experts in host memory have weight gradients chunk by chunk.
    copied = [count * shape.expert_bytes for count in shape.experts] if shape.expert_bytes else []
    deferred_s = tuple(map(model.experts_wgrad, shape.rows if copied else (all_rows / weight_groups,) * weight_groups))
    return Chunking(
        chunks=shape.chunks,
        by=shape.by,
        first_s=_exchanges_s(model, narrow or shape.bytes_by_lane, shape.chunks),
        experts_s=tuple(
            _experts_s(model, phase, rows, count) + beside_s
            for rows, count, beside_s in zip(shape.rows, shape.experts, inside_s, strict=True)
        ),
        second_s=_exchanges_s(model, shape.bytes_by_lane if distinct is None else distinct.back_by_lane, shape.chunks),
        deferred_s=() if phase == "forward" else deferred_s,
        chunk_bytes=_chunk_bytes(shape, phase),
        fetch_s=tuple(map(model.host_up, copied)),
        return_s=() if phase == "forward" else tuple(map(model.host_down, copied)),
        kept_bytes=0 if distinct is None or distinct.gateway is None else distinct.gateway.kept,
    )


def _exchanges_s(model: CostModel, bytes_by_lane: Mapping[str, tuple[int, ...]], chunks: int) -> tuple[float, ...]:
    """Seconds of the exchange of each chunk."""
    lanes_s = [tuple(map(model.wire(lane), sizes)) for lane, sizes in bytes_by_lane.items()]
    return tuple(map(max, *lanes_s)) if len(lanes_s) > 1 else lanes_s[0] if lanes_s else (0.0,) * chunks


def _experts_s(model: CostModel, phase: Phase, rows: int, count: int) -> float:
    """Seconds of so many experts on so many rows."""
    if not rows:
        return 0.0
    forward = phase == "forward"
    line = model.experts if forward else model.experts_dgrad
    own_s = count * (model.expert_s if forward else model.expert_dgrad_s)
    return line(rows) + own_s - model.weights_hidden * min(line.beta_s * rows, own_s)


def _halves_s(model: CostModel, distinct: DistinctShape) -> tuple[float, float] | None:
    """Seconds of O and of Or: the first and the second half of the experts, with what they have of the rows that stay;
    None where there is nothing to part."""
    rows, experts = distinct.own_rows, distinct.own_experts
    first = experts // 2
    if not rows or not first:
        return None
    first_rows = rows * first // experts
    first_s, rest_s = (_experts_s(model, "forward", *half)
                       for half in ((first_rows, first), (rows - first_rows, experts - first)))  # fmt: skip
    return first_s, rest_s


def _chunk_bytes(shape: StepShape, phase: Phase) -> tuple[int, ...]:
    """What one exchange of each chunk holds on the busiest rank: all rows of its experts, or, deduplicated, what
    crosses the wires, and is passed on inside nodes behind that, with the metadata beside the chunk that they go
    with."""
    distinct = shape.distinct
    if distinct is None:
        return tuple(rows * shape.row_bytes for rows in shape.rows)
    ways = (shape.bytes_by_lane, distinct.back_by_lane)
    none, inside = (0,) * shape.chunks, distinct.inside
    passed_on = (none, none) if inside is None else (inside.out, inside.back)
    held = [max(sum(sizes[c] for sizes in way.values()) + more[c] for way, more in zip(ways, passed_on, strict=True))
            for c in range(shape.chunks)]  # fmt: skip
    if phase == "forward":
        held[0] += sum(distinct.metadata_by_lane.values()) + (0 if inside is None else inside.metadata)
    else:
        held[-1] += sum(distinct.gradients_by_lane.values()) + (0 if inside is None else inside.gradients)
    return tuple(held)


def _op_count(model: CostModel, num_ops: int | None) -> int:
    known = len(model.backbone_s)
    if num_ops is None:
        return known
    if not 0 <= num_ops <= known:
        raise ConfigError("num_ops", num_ops, f"from 0 to {known}, the backbone ops of the cost model")
    return num_ops
