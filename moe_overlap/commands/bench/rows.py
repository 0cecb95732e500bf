"""From samples to rows: bounds from measured terms, ratios, flags. A row is a flat dict with the keys of KEYS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_overlap.commands.bench.cases import BlockPair
from moe_overlap.commands.bench.phases import has
from moe_overlap.commands.bench.spread import Spread
from moe_overlap.commands.bench.timing import Samples
from moe_overlap.commands.bench.wires import Exchanges
from moe_overlap.launch.launch import World
from moe_overlap.measure import overlap as formulas
from moe_overlap.measure.overlap import median, percentile
from moe_overlap.measure.timeline import overlap
from moe_overlap.schedule.builders import SchedulePair
from moe_overlap.schedule.recorder import TimelineEvent

KEYS = (
    "case schedule phase routing router mu chunks backward_chunks slot backward_slot predicted_ms time_ms_median "
    "time_ms_p10 time_ms_p90 serial_ms nocomm_ms bound_ms comm_share exposed_ms overlap_eff timeline_overlap "
    "headroom speedup_vs_serial speedup_vs_top2 exchange_ms comm_cpu_ms payload_bytes inter_node_bytes "
    "row_meta_bytes meta_bytes max_over_mean local_share peak_mem_mb rows_peak_mb bit_equal max_rel_err ranks "
    "ranks_per_node threads tokens hidden ffn experts top_k dtype dedup repeats compute flagged hardware link torch "
    "commit date"
).split()


@dataclass(frozen=True, eq=False, kw_only=True)
class RowPlan:
    """What a row measures. `pair` is the schedule that runs, joined in the case of a serial row."""

    model: BlockPair
    schedule: str
    pair: SchedulePair
    backward_slot: int | None = None

    @property
    def case(self) -> str:
        return self.model.case

    @property
    def pipelined(self) -> bool:
        """Whether nothing but the chunks' own compute lies beside the exchanges."""
        return self.case == "top2" and self.schedule != "serial"

    @property
    def cut_apart(self) -> bool:
        """Whether its bound is that of a step cut into chunks (`formulas.cut_bound`), not that of one window."""
        return self.pipelined or max(self.pair.chunks, self.pair.backward_chunks) > 1

    @property
    def name(self) -> str:
        text = f"{self.case} {self.schedule}"
        if self.schedule != "serial" and self.pair.slot is None:
            cuts = dict.fromkeys((self.pair.chunks, self.pair.backward_chunks))
            text += f"({','.join(map(str, cuts))})"
        if self.pair.slot is not None:
            text += f" slot {self.pair.slot}"
            if self.backward_slot is not None:
                text += f", backward slot {self.backward_slot}"
        return text


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found before timing. Memory in MiB, of the rank with the most."""

    bit_equal: bool
    max_rel_err: float
    peak_mem_mb: float | None
    rows_peak_mb: float


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Medians of this rank's step without communication, in seconds. own, own_dgrad: of the experts, on the rows that
    stay, which run beside the exchanges like ops of the window."""

    whole: float
    experts: float
    dgrad: float
    wgrad: float
    window: float
    window_backward: float
    own: float = 0.0
    own_dgrad: float = 0.0

    @property
    def outside(self) -> float:
        """The measured parts outside the window."""
        used = self.experts + self.dgrad + self.wgrad + self.window + self.window_backward + self.own + self.own_dgrad
        return max(0.0, self.whole - used)


def terms_of(samples: Samples) -> Terms:
    """Sums per step of the measured actions, medians over the repeats."""

    def total(verbs: Sequence[str]) -> float:
        return median([_total(events, verbs) for events in samples.events])

    return Terms(
        whole=median(samples.own_s),
        experts=total(["E"]),
        dgrad=total(["Ed"]),
        wgrad=total(["Ew", "Eg"]),
        window=total(["B", "S"]),
        window_backward=total(["Bt", "St"]),
        own=total(["O", "Or"]),
        own_dgrad=total(["Od"]),
    )


def _total(events: Sequence[TimelineEvent], verbs: Sequence[str]) -> float:
    return sum(
        event.end_s - event.start_s
        for event in events
        if event.lane == "comp" and event.action.rstrip("0123456789") in verbs
    )


def bound_s(
    world: World, plan: RowPlan, phase: str, terms: Terms, exchanges: Exchanges, *, nocomm: float, even: bool
) -> float | None:
    """What no order of the row's own cut can beat, in seconds; None for serial rows. Collective.

    terms, exchanges, nocomm: of the case in one chunk, `exchanges` with those of backward in train, as is its total.
    One chunk in a window with ops: from measured terms, the largest over ranks. Formulas: `measure/overlap.py`.
    """
    if plan.schedule == "serial":
        return None
    forward, backward = has(phase, "forward"), has(phase, "backward")
    if plan.cut_apart:
        cuts = plan.pair.chunks if forward else None, plan.pair.backward_chunks if backward else None
        # Otherwise rows that stay are computed meanwhile.
        alone = plan.pipelined and not plan.pair.deduplicated and plan.pair.by != "peers"
        return formulas.cut_bound(nocomm, exchanges.total_s, *cuts, alone=alone, even=even)
    each = exchanges.dispatch_s, exchanges.combine_s
    total = 0.0
    if forward:
        total += formulas.shortcut_bound(terms.experts, terms.window + terms.own, *each)
    if backward:
        beside = terms.window_backward + terms.wgrad + terms.own_dgrad
        total += formulas.shortcut_bound(terms.dgrad, beside, *each)
    own = torch.tensor([terms.outside + total], dtype=torch.float64)
    return max(float(part) for part in world.gather(own))


def exposed_and_overlap(world: World, samples: Samples) -> tuple[float | None, float | None]:
    """(exposed seconds, timeline overlap): medians over the repeats, of the rank that is worst off. Collective."""
    if world.size == 1:
        return None, None
    found = [overlap(events) for events in samples.events]
    exposed = median([one.exposed_s for one in found]) if found else 0.0
    shares = [one.timeline_overlap for one in found if one.timeline_overlap is not None]
    own = torch.tensor([exposed, median(shares) if shares else float("nan")], dtype=torch.float64)
    parts = torch.stack(world.gather(own))
    if bool(parts[:, 1].isnan().any()):
        return None, None
    return float(parts[:, 0].max()), float(parts[:, 1].min())


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """Medians in seconds that rows are compared with; None where not measured."""

    serial: float
    nocomm: float
    top2_serial: float | None
    comm_share: float | None


def flag_of(*, oversubscribed: bool, inflated: bool, noisy: bool, drifted: bool) -> str | None:
    """The gravest of what is wrong with a row; one that drifted has a sound time beside an outdated prediction."""
    found = {"oversubscribed": oversubscribed, "inflated": inflated, "noisy": noisy, "drifted": drifted}
    return next((name for name, wrong in found.items() if wrong), None)


def row_of(
    plan: RowPlan,
    samples: Samples,
    baselines: Baselines,
    exchanges: Exchanges,
    verdict: Verdict,
    *,
    bound: float | None,
    predicted: float | None,
    exposed: tuple[float | None, float | None],
    spread: Spread,
    flagged: str | None,
    constant: Mapping[str, Any],
) -> dict[str, Any]:
    """One row, all keys in their order. `constant`: the keys that are the same in a whole run."""
    time_s = median(samples.time_s)
    claims = flagged in (None, "noisy", "drifted")
    serial = plan.schedule == "serial"
    hides = claims and baselines.comm_share is not None
    eff = 0.0 if serial else formulas.overlap_eff(time_s, baselines.serial, baselines.nocomm) if hides else None
    versus_top2 = baselines.top2_serial / time_s if claims and baselines.top2_serial is not None else None
    row = {
        **constant,
        "case": plan.case,
        "schedule": plan.schedule,
        "chunks": plan.pair.chunks,
        "backward_chunks": plan.pair.backward_chunks if has(constant["phase"], "backward") else None,
        "slot": plan.pair.slot,
        "backward_slot": plan.backward_slot,
        "predicted_ms": _ms(predicted),
        "time_ms_median": _ms(time_s),
        "time_ms_p10": _ms(percentile(samples.time_s, 0.1)),
        "time_ms_p90": _ms(percentile(samples.time_s, 0.9)),
        "serial_ms": _ms(baselines.serial),
        "nocomm_ms": _ms(baselines.nocomm),
        "bound_ms": _ms(bound),
        "comm_share": _round(baselines.comm_share),
        "exposed_ms": _ms(exposed[0]),
        "overlap_eff": _round(eff),
        "timeline_overlap": _round(exposed[1]),
        "headroom": _round(formulas.headroom(exchanges.total_s, baselines.nocomm) if exchanges.total_s else None),
        "speedup_vs_serial": _round(baselines.serial / time_s if claims else None),
        "speedup_vs_top2": _round(versus_top2),
        "exchange_ms": _ms(exchanges.total_s),
        "comm_cpu_ms": _ms(exchanges.cpu_s),
        "payload_bytes": exchanges.payload_bytes,
        "inter_node_bytes": exchanges.inter_node_bytes,
        "row_meta_bytes": exchanges.row_meta_bytes,
        "meta_bytes": exchanges.meta_bytes,
        "max_over_mean": _round(spread.max_over_mean),
        "local_share": _round(spread.local_share),
        "peak_mem_mb": _round(verdict.peak_mem_mb, 1),
        "rows_peak_mb": _round(verdict.rows_peak_mb, 3),
        "bit_equal": verdict.bit_equal,
        "max_rel_err": verdict.max_rel_err,
        "flagged": flagged,
    }
    return {key: row[key] for key in KEYS}


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 4)


def _round(value: float | None, digits: int = 4) -> float | None:
    return None if value is None else round(value, digits)
