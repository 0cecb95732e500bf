"""One phase (infer or train) of `bench layer`: link, slots, checks, exchanges, timing, rows, panels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from moe_overlap.commands.bench.cases import BlockPair
from moe_overlap.commands.bench.check import MAX_REL_ERR, max_rel_err, peak_memory, run, same_bits, worst
from moe_overlap.commands.bench.options import LATENCY_S
from moe_overlap.commands.bench.phases import has
from moe_overlap.commands.bench.planned import CasePlan, auto_rows, plan_case, predictions
from moe_overlap.commands.bench.rows import (
    Baselines,
    RowPlan,
    Verdict,
    bound_s,
    exposed_and_overlap,
    flag_of,
    row_of,
    terms_of,
)
from moe_overlap.commands.bench.setting import Setting
from moe_overlap.commands.bench.slept import slept_experts
from moe_overlap.commands.bench.spread import spread_of
from moe_overlap.commands.bench.timing import Runner, Samples, Variant
from moe_overlap.commands.bench.wires import Exchanges, isolated, solve_link
from moe_overlap.layer.recorded import events_of_all
from moe_overlap.measure.overlap import comm_share, is_inflated, is_noisy, median
from moe_overlap.measure.picture import Panel
from moe_overlap.measure.slow import Slow, why_slow
from moe_overlap.measure.timeline import TimelineEvent, record
from moe_overlap.ops import workspace
from moe_overlap.schedule.builders import chunked, serial, shared_expert
from moe_overlap.schedule.published import filled, pairwise
from moe_overlap.transport.link import LinkSpec

CHUNKS = (2, 4, 8)
MOST_CHUNKS = 16
FILLED = 4  # groups of experts whose weight gradients fill gaps
SLOT_REPEATS = 3
PANEL_REPEATS = 3
SHARE_ROUNDS = 4


class CheckFailed(Exception):
    """A row is wrong: its results differ between overlap on and off, or are far from float64. No speed is claimed."""


@dataclass(frozen=True, kw_only=True)
class PhaseResult:
    """Rows, pictures of the fastest of each schedule, and by their titles why the slowest of the recorded steps was."""

    rows: list[dict[str, Any]]
    panels: list[Panel]
    slowest: dict[str, Slow]


def measure_phase(setting: Setting, phase: str) -> PhaseResult:
    """All rows of one phase. Collective; the same rows on all ranks."""
    runner = Runner(setting.world, phase, setting.x_TD, setting.dy_TD)
    timed = timed_models(setting)
    with slept_experts(setting.sleep):
        open_link(setting, runner, timed["top2"], rounds=1)
        slots = {case: best_slots(setting, runner, model) for case, model in timed.items()}
    plans = row_plans(setting, timed, slots, phase)
    setting.say(f"{phase}: checking {len(plans)} rows")
    verdicts = [verify(setting, runner, plan) for plan in plans]
    with slept_experts(setting.sleep):
        # Only now: as shortly before the timing as can be, and warm.
        link = open_link(setting, runner, timed["top2"], rounds=SHARE_ROUNDS)
        known = plan_cases(setting, runner, timed) if "auto" in setting.options.schedules else {}
    chosen = [row for case, plan in known.items() for row in auto_rows(timed[case], plan, phase)]
    plans, verdicts = plans + chosen, verdicts + [verify(setting, runner, plan) for plan in chosen]
    predicted = predictions(plans, known)
    setting.say(f"{phase}: measuring the exchanges alone")
    exchanges = measure_exchanges(setting, plans, phase)
    with slept_experts(setting.sleep):
        samples = time_rows(setting, runner, plans)
        taken = [take_panel(setting, runner, plan) for plan in shown(plans, samples)]
    rows = make_rows(setting, phase, link, plans, samples, exchanges, verdicts, predicted, known)
    return PhaseResult(rows=rows, panels=[panel for panel, _ in taken],
                       slowest={panel.title: slow for panel, slow in taken})  # fmt: skip


def timed_models(setting: Setting) -> dict[str, BlockPair]:
    """The models whose speed is measured: the real ones, or their slept copies on the same transports."""
    if setting.sleep is None:
        return setting.models
    ids_TK, weights_TK = setting.routing
    return {
        case: BlockPair(
            case,
            model.sizes,
            ids_TK,
            weights_TK,
            setting.wires[case].core,
            dtype=model.dtype,
            dedup=model.dedup,
            ranks_per_node=setting.options.ranks_per_node,
            wrap=setting.sleep.wrap,
        )  # fmt: skip
        for case, model in setting.models.items()
    }


def open_link(setting: Setting, runner: Runner, top2: BlockPair, *, rounds: int) -> str:
    """Put the link between the nodes, solving for its rate where a share was asked for; its name in the rows.

    One round is a guess that will do for choosing slots; more correct it by what steps really took.
    """
    options = setting.options
    if options.comm_share is None:
        link = LinkSpec.parse(options.link)
    else:
        if rounds > 1:
            setting.say(f"{runner.phase}: solving for the link of a {options.comm_share:.0%} share")
        link = solve_link(
            runner,
            top2,
            setting.wires["top2"],
            share=options.comm_share,
            latency_s=LATENCY_S,
            ranks_per_node=options.ranks_per_node,
            rounds=rounds,
        )
    for wires in setting.wires.values():
        wires.emulate(link, options.ranks_per_node)
    return setting.wires["top2"].name_of(link)


def best_slots(setting: Setting, runner: Runner, model: BlockPair) -> tuple[int, int]:
    """(forward slot, backward slot) of the fastest schedule; both are timed in one run and chosen apart. Collective."""
    if model.case == "top2":
        return 0, 0
    wires, count = setting.wires[model.case], model.num_slots
    pairs = [model.as_asked(model.window_pair(k) if model.position else shared_expert(k)) for k in range(count)]
    variants = [Variant(name=f"slot {k}", model=model, pair=pair, transport=wires.link) for k, pair in enumerate(pairs)]
    samples = runner.interleave(variants, [SLOT_REPEATS] * count)
    # The quickest of few runs: what disturbs a run only ever makes it slower.
    forward = [min(one.forward_max_s) for one in samples]
    backward = [min(t - f for t, f in zip(one.time_s, one.forward_max_s, strict=True)) for one in samples]
    best = forward.index(min(forward))
    back = backward.index(min(backward)) if has(runner.phase, "backward") and model.position else best
    if has(runner.phase, "backward") and not model.position:
        whole = [min(one.time_s) for one in samples]
        best = back = whole.index(min(whole))
    setting.say(f"{runner.phase}: {model.case} best slot {best}" + (f", backward {back}" if back != best else ""))
    return best, back


def row_plans(
    setting: Setting, models: dict[str, BlockPair], slots: dict[str, tuple[int, int]], phase: str
) -> list[RowPlan]:
    """Every row to measure, each case's serial one first; serial rows are baselines even where not asked for."""
    found: list[RowPlan] = []
    for case, model in models.items():
        slot, back = slots[case]
        backward = back if has(phase, "backward") and model.position else None
        if model.position:
            pair = model.as_asked(model.window_pair(slot, backward))
            found.append(RowPlan(model=model, schedule="serial", pair=pair.join(), backward_slot=backward))
            found.append(RowPlan(model=model, schedule="shortcut", pair=pair, backward_slot=backward))
        elif case == "shared1":
            found.append(RowPlan(model=model, schedule="serial", pair=model.as_asked(serial(shared=True))))
            found.append(RowPlan(model=model, schedule="shared_expert", pair=model.as_asked(shared_expert(slot))))
        else:
            found.append(RowPlan(model=model, schedule="serial", pair=model.as_asked(serial())))
            found += [RowPlan(model=model, schedule="chunked", pair=model.as_asked(chunked(r))) for r in CHUNKS]
            local = model.moe.expert_weights[0].shape[0]
            found += [RowPlan(model=model, schedule="expert_groups", pair=model.as_asked(chunked(r, "experts")))
                      for r in CHUNKS if r <= local]  # fmt: skip
            if model.dedup == "off":  # there is no such form of a cut by peers
                pair = pairwise(min(setting.options.ranks, MOST_CHUNKS))
                found.append(RowPlan(model=model, schedule="fastermoe", pair=pair))
            pair = model.as_asked(filled(min(local, FILLED)))
            found.append(RowPlan(model=model, schedule="lancet", pair=pair))
    wanted, cases = setting.options.schedules, setting.options.cases
    return [plan for plan in found if plan.schedule == "serial" or (plan.schedule in wanted and plan.case in cases)]


def verify(setting: Setting, runner: Runner, plan: RowPlan) -> Verdict:
    """Overlapped against joined (a serial row against a repeat) and against float64, with real compute. Collective."""
    world, phase = setting.world, runner.phase
    model, wires = setting.models[plan.case], setting.wires[plan.case]
    model.use(plan.pair.join(), wires.link)
    joined = run(model, phase, runner.x_TD, runner.dy_TD)
    model.use(plan.pair, wires.link)
    with peak_memory() as peak, workspace.measured_peak() as rows_peak:
        overlapped = run(model, phase, runner.x_TD, runner.dy_TD)
    equal = worst(world, 0.0 if same_bits(joined, overlapped) else 1.0) == 0.0
    error = worst(world, max_rel_err(overlapped[0], setting.right(plan.case)))
    if not equal:
        raise CheckFailed(f"{phase} {plan.name}: overlap on and off differ in some bits")
    if math.isnan(error) or error > MAX_REL_ERR[model.dtype]:
        raise CheckFailed(
            f"{phase} {plan.name}: max|y-y64|/max|y64| = {error:.3g}, expected at most {MAX_REL_ERR[model.dtype]:g}"
        )
    return Verdict(
        bit_equal=equal,
        max_rel_err=error,
        peak_mem_mb=worst(world, peak[0]) if peak else None,
        rows_peak_mb=worst(world, rows_peak.bytes / 2**20),
    )


def plan_cases(setting: Setting, runner: Runner, models: dict[str, BlockPair]) -> dict[str, CasePlan]:
    """What the planner knows of each case, from a calibration on the link. Collective."""
    found = {}
    for case in setting.options.cases:
        setting.say(f"{runner.phase}: calibrating {case}")
        found[case] = plan_case(runner, models[case], setting.wires[case].link)
        predicted_ms = 1e3 * found[case].predicted_s(found[case].planned.pair)
        pair = found[case].planned.pair
        backward = f" | {pair.backward}" if runner.phase == "train" else ""
        setting.say(f"{runner.phase}: auto for {case}: {pair.forward}{backward}, predicted {predicted_ms:.1f} ms")
    return found


ExchangesOf = dict[tuple[str, int], Exchanges]


def measure_exchanges(setting: Setting, plans: Sequence[RowPlan], phase: str) -> ExchangesOf:
    """By case and number of chunks. Collective."""
    found: ExchangesOf = {}
    for plan in plans:
        for chunks in dict.fromkeys((plan.pair.chunks, plan.pair.backward_chunks)):
            if (plan.case, chunks) not in found:
                wires = setting.wires[plan.case]
                found[plan.case, chunks] = isolated(setting.world, plan.model, chunked(chunks), wires, phase)
    return found


@dataclass(kw_only=True)
class Timed:
    """Samples of each row, and of each case without communication."""

    rows: list[Samples]
    nocomm: dict[str, Samples]


def time_rows(setting: Setting, runner: Runner, plans: Sequence[RowPlan]) -> Timed:
    """The interleaved loop; rows that came out noisy are timed once more."""
    repeats = setting.options.repeats
    over_link = [variant_of(setting, plan) for plan in plans]
    bare = {plan.case: variant_of(setting, plan, bare=True) for plan in plans if plan.schedule == "serial"}
    variants = [*over_link, *bare.values()]
    counts = [repeats] * len(variants)
    setting.say(f"{runner.phase}: timing {len(variants)} variants, {repeats} rounds")

    def progress(done: int, rounds: int) -> None:
        if done == rounds or done % max(1, rounds // 5) == 0:
            setting.say(f"{runner.phase}: round {done} of {rounds}")

    samples = runner.interleave(variants, counts, progress=progress)
    noisy = [i for i, one in enumerate(samples) if is_noisy(one.time_s)]
    if noisy:
        setting.say(f"{runner.phase}: {len(noisy)} noisy, timing them again: " +
                    ", ".join(variants[i].name for i in noisy))  # fmt: skip
        again = runner.interleave([variants[i] for i in noisy], [counts[i] for i in noisy], warmup=0)
        for i, one in zip(noisy, again, strict=True):
            samples[i] = one
    found = iter(samples)
    return Timed(
        rows=[next(found) for _ in over_link],
        nocomm={case: next(found) for case in bare},
    )


def variant_of(setting: Setting, plan: RowPlan, *, bare: bool = False) -> Variant:
    wires = setting.wires[plan.case]
    return Variant(
        name=plan.name + (" without communication" if bare else ""),
        model=plan.model,
        pair=plan.pair,
        transport=wires.nocomm if bare else wires.link,
    )


def make_rows(
    setting: Setting,
    phase: str,
    link: str,
    plans: Sequence[RowPlan],
    timed: Timed,
    exchanges: ExchangesOf,
    verdicts: Sequence[Verdict],
    predicted: Sequence[float | None],
    known: Mapping[str, CasePlan],
) -> list[dict[str, Any]]:
    """The rows that were asked for. Collective."""
    communicates = setting.world.size > 1
    serial_s: dict[str, float] = {}
    nocomm_s: dict[str, float] = {}
    inflated: dict[str, bool] = {}
    drifted: set[str] = set()
    for plan, one in zip(plans, timed.rows, strict=True):
        if plan.schedule == "serial":
            exchange = exchanges[plan.case, plan.pair.chunks]
            serial_s[plan.case] = median(one.time_s)
            nocomm_s[plan.case] = median(timed.nocomm[plan.case].time_s)
            if plan.case in known and known[plan.case].drifted(serial_s[plan.case]):
                drifted.add(plan.case)
            inflated[plan.case] = communicates and is_inflated(
                serial_s[plan.case], nocomm_s[plan.case], exchange.total_s
            )
    rows = []
    for plan, one, verdict, predicted_s in zip(plans, timed.rows, verdicts, predicted, strict=True):
        exchange, back = (exchanges[plan.case, r] for r in (plan.pair.chunks, plan.pair.backward_chunks))
        whole = exchanges[plan.case, 1]  # those of the serial row
        bound = bound_s(setting.world, plan, phase, terms_of(timed.nocomm[plan.case]), whole,
                        nocomm=nocomm_s[plan.case], even=setting.options.routing == "balanced")  # fmt: skip
        exposed = exposed_and_overlap(setting.world, one)
        flagged = flag_of(oversubscribed=setting.oversubscribed, inflated=inflated[plan.case],
                          noisy=is_noisy(one.time_s), drifted=plan.case in drifted)  # fmt: skip
        spread = spread_of(setting.world, plan.model, setting.options.ranks_per_node)
        baselines = Baselines(
            serial=serial_s[plan.case],
            nocomm=nocomm_s[plan.case],
            top2_serial=None if inflated["top2"] else serial_s["top2"],
            comm_share=comm_share(serial_s["top2"], nocomm_s["top2"]) if communicates else None,
        )
        constant = {**setting.constant, "phase": phase, "link": link}
        both = {"train": exchange.with_backward(back), "backward": back}.get(phase, exchange)
        row = row_of(plan, one, baselines, both, verdict, bound=bound, predicted=predicted_s, exposed=exposed,
                     spread=spread, flagged=flagged, constant=constant)  # fmt: skip
        asked = "auto" if plan.schedule == "mirrored" else plan.schedule
        if asked in setting.options.schedules and plan.case in setting.options.cases:
            rows.append(row)
    return rows


# ---------------------------------------------------------------- pictures


def shown(plans: Sequence[RowPlan], timed: Timed) -> list[RowPlan]:
    """For the picture: serial top2, then the fastest row of every other schedule."""
    best: dict[tuple[str, str], tuple[float, RowPlan]] = {}
    for plan, one in zip(plans, timed.rows, strict=True):
        if plan.schedule != "serial" or plan.case == "top2":
            key = (plan.case, plan.schedule)
            candidate = (median(one.time_s), plan)
            best[key] = min(best.get(key, candidate), candidate, key=lambda pair: pair[0])
    return [plan for _, plan in best.values()]


def take_panel(setting: Setting, runner: Runner, plan: RowPlan) -> tuple[Panel, Slow]:
    """Record a few runs with every op watched; the middle one, and why the slowest was slower than the others.
    Collective."""
    variant = variant_of(setting, plan)
    runs: list[list[TimelineEvent]] = []
    own_s: list[float] = []
    for _ in range(PANEL_REPEATS):
        samples = Samples()
        with watching(plan.model), record() as events:
            runner.once(variant, samples)
        runs.append(events_of_all(runner.timed(events), setting.world))
        own_s += samples.own_s
    seconds = runner.maximum(own_s)
    middle, slowest = (seconds.index(one) for one in (sorted(seconds)[len(seconds) // 2], max(seconds)))
    slow = why_slow(runs[slowest], [run for i, run in enumerate(runs) if i != slowest])
    names = {f"B{i}": name for i, name in enumerate(plan.model.op_names)}
    return Panel(title=plan.name, events=runs[middle], names=names, column=runner.phase), slow


@contextmanager
def watching(model: BlockPair) -> Iterator[None]:
    model.watch.on = True
    try:
        yield
    finally:
        model.watch.on = False
