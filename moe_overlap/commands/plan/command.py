"""`moe-overlap plan`: print the plan of the point that was asked for; plan.png and plan.json hold the whole sweep."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_overlap.commands.parser import check_folder
from moe_overlap.commands.plan.alternatives import alternative_lines, alternatives
from moe_overlap.commands.plan.elsewhere import elsewhere, elsewhere_lines
from moe_overlap.commands.plan.machine import (
    OP_NAMES,
    WINDOW_OPS,
    agreement,
    agreement_s,
    busiest,
    distinct_rows,
    expert_params,
    local_experts,
    metadata,
    routed,
    shapes,
    traffic_of,
    weights_read_s,
)
from moe_overlap.commands.plan.offload import offload_lines
from moe_overlap.commands.plan.options import PlanOptions, parse
from moe_overlap.commands.plan.replicas import replica_line, replica_record
from moe_overlap.commands.plan.sweep import CODES, Prediction, Sweep, asked, bandwidths, rate_text, sweep, total_s
from moe_overlap.commands.plan.uncertainty import certainty, certainty_line
from moe_overlap.commands.plan.whole_model import WholeModel, fit_line, model_lines, whole_model
from moe_overlap.errors import ConfigError
from moe_overlap.measure.files import write_atomically
from moe_overlap.planning.copy_costs import break_even, break_even_text, costs_of
from moe_overlap.planning.explain import Change, explain, in_mb, in_ms
from moe_overlap.planning.machines import MACHINES
from moe_overlap.schedule.actions import Phase
from moe_overlap.schedule.words import imports_of, legend, python_of

OUTPUTS = ("plan.png", "plan.json")
WORTH = 1.05  # a speed-up that is worth a line
TEXT_COLUMNS = 7


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit status. ConfigError for bad input."""
    options = parse(argv)
    out = check_folder("--out", options.out, OUTPUTS)
    points = {kind: asked(options, kind) for kind in options.kinds}
    point = points[options.kinds[0]]
    if point.time_s <= 0 and options.tokens:
        raise ConfigError("--cost-model", "figures that are all 0", "a step in which something takes time")
    whole = whole_model(options, point) if options.layers and options.cost_model is None else None
    fit = "" if whole is None else fit_line(options, whole)
    sections = [[fit]] if fit else []
    sections += [_heading(options, point)]
    if not options.tokens:
        sections.append(_idle(point))
    if whole is not None:
        sections.append(model_lines(options, whole))
    sections += [_assumptions(options, point, whole), _kinds(points)]
    if options.tokens:
        sections += _of_tokens(options, points, whole)
    print("\n\n".join("\n".join(lines) for lines in sections), flush=True)  # before what takes longer
    found = sweep(options) if options.tokens and bandwidths(options) else None
    record = json.dumps(_record(options, points, found), indent=1, allow_nan=False)
    write_atomically(out / "plan.json", (record + "\n").encode())
    if found is not None:
        print("\n" + "\n".join(_map(found, point)), flush=True)
        write_png(out / "plan.png", options, point, found)
    written = OUTPUTS if found is not None else OUTPUTS[1:]
    print(f"\nwrote {', '.join(str(out / name) for name in written)}")
    return 0


def _of_tokens(options: PlanOptions, points: dict[str, Prediction], whole: WholeModel | None) -> list[list[str]]:
    """What there is to say of a step in which something moves."""
    point, sections = points[options.kinds[0]], []
    if options.cost_model is None:
        sections += _answers(options, point, whole)
    if options.dedup != "off" and options.expert_offload is None:
        sections.append(_deduplication(options, points))
    sections += [lines for lines in [_copies(options, point), offload_lines(options, point)] if lines]
    return sections + [[text] for text in _explained(points, point)]


def _idle(point: Prediction) -> list[str]:
    """Of a step in which no rank has a token."""
    left = f"what is left takes {in_ms(point.time_s)}, {in_ms(point.model.agree_s)} of it the agreement on the counts"
    return [
        f"No rank has a token: nothing is exchanged and no expert computes; {left}.",
        "A rank without tokens beside ranks that have some is in every exchange, and its experts work for them: its "
        "step takes as long as theirs. Ask for it with their --tokens.",
    ]


def write_png(path: Path, options: PlanOptions, point: Prediction, found: Sweep) -> None:
    """`picture.write_png`, which takes longer to load than all the rest takes."""
    from moe_overlap.commands.plan.picture import write_png as write

    write(path, options, point, found)


def _answers(options: PlanOptions, point: Prediction, whole: WholeModel | None) -> list[list[str]]:
    """How sure it is, what else would give, and what it would be elsewhere: from figures of a machine alone."""
    found = []
    if options.draws:
        found.append([certainty_line(certainty(options, point, draws=options.draws))])
    copies = replica_line(options, point, whole)
    found.append(alternative_lines(alternatives(options, point), point.time_s, [copies] if copies else []))
    found.append(elsewhere_lines(elsewhere(options, point), point.time_s))
    return [lines for lines in found if lines]


def _heading(options: PlanOptions, point: Prediction) -> list[str]:
    """The answer: what wins and by how much, the line of Python that runs it, the letters of what follows."""
    at = point.at
    rate = "" if at.bytes_per_s is None or "inter" not in at.peers else f", {rate_text(at.bytes_per_s)} between nodes"
    groups = f" in groups of {at.group} that exchange" if at.group < point.ranks else ""
    pair = point.pair
    line = python_of(pair)
    lines = [
        f"{point.kind}, {options.phase}, {point.ranks} ranks{groups}, {at.per_node} per node{rate}: "
        f"predicted {in_ms(point.time_s)} for one block pair, {point.speedup:.2f}x serial",
        f"To run it: {line}" + (" with hierarchical=True" if _for_nodes(options, point) else ""),
        *imports_of(line),
        f"serial {in_ms(point.serial_s)}, of that {100 * point.comm_share:.0f} % communication"
        f"{_of_the_layer(point)}; "
        f"compute alone {in_ms(point.compute_s)}{_agreeing(point)}; bound of any order {in_ms(point.bound_s)}",
        *legend(pair, [phase.phase for phase in point.phases]),
    ]
    return lines


def _agreeing(point: Prediction) -> str:
    """Of what is left without exchanges, the agreement on counts, where it is over 1 %: it is no compute."""
    agree_s = point.model.agree_s
    return f" ({in_ms(agree_s)} of it the agreement on counts)" if agree_s > 0.01 * point.compute_s else ""


def _for_nodes(options: PlanOptions, point: Prediction) -> bool:
    return options.dedup == "node" and point.deduplicated and len(point.at.peers) == 2


def _of_the_layer(point: Prediction) -> str:
    """The share of the experts' layer alone, which papers often name: without attention and MLP of the pair."""
    whole_s = sum(phase.window.head_s + phase.window.tail_s + sum(phase.window.chunking(1, "tokens").experts_s)
                  + sum(phase.window.chunking(1, "tokens").deferred_s) for phase in point.plain)  # fmt: skip
    comm_s = point.serial_s - point.compute_s
    return "" if not comm_s else f" ({100 * comm_s / (comm_s + whole_s):.0f} % of the experts' layer alone)"


def _assumptions(options: PlanOptions, point: Prediction, whole: WholeModel | None) -> list[str]:
    lines = ["Nothing was run. Assumed, beside the figures asked for:", _rows_line(options, point)]
    if whole is None:
        lines += [
            "  no rank is late; memory is not checked (--layers, --memory)",
            "  not in the step: the all-reduce of dense gradients, the optimizer, everything outside the block pair",
        ]
    else:
        lines.append("  no rank is late; the optimizer takes no time; stages are equal")
    for flag, path in (("--model", options.model), ("--measured", options.measured)):
        lines += [] if path is None else [f"  figures of {Path(path).name} ({flag}), where no option says otherwise"]
    if options.machine is not None:
        known = MACHINES[options.machine]
        lines.append(f"  figures of {known.name}: {known.source}; how much of them is reached: docs/validation.md")
    if point.at.per_node < min(point.at.group, options.ranks_per_node):
        lines.append(f"  groups of {point.at.group} ranks do not fit nodes of {options.ranks_per_node}: taken as "
                     f"{point.at.per_node} of a group per node, the fewest that any node has")  # fmt: skip
    if _for_nodes(options, point):
        lines.append(_gateways(options, point))
    cost = agreement(options, point.at, distinct=point.deduplicated)
    lines.append(
        f"  to agree on the counts of a step each rank sends {cost.messages} messages in {len(cost.rounds)} round(s), "
        f"{cost.bytes} bytes" + _takes(options, point)
    )
    if options.cost_model is not None:
        return [
            *lines,
            f"  compute, exchanges and slowdowns as in the cost model, {options.cost_model.source}",
            "  times of backbone ops are those calibrated; --tokens, --top-k, --hidden and --dtype give rows and bytes",
        ]
    lines += [
        f"  matmuls at {options.flops / 1e12:g} TFLOP/s (--flops); rows are moved at "
        f"{options.memory_bandwidth / 1e9:g} GB/s (--memory-bandwidth)",
        f"  {'beside' if options.weights == 'beside' else 'before'} its matmuls in a chunk, an expert's weights are "
        f"read in {in_ms(weights_read_s(options))} (--weights, --memory-bandwidth): by tokens once for every chunk, by "
        "expert groups once a step",
        f"  an exchange costs {_us(options.latency or 0)} (--latency) and {_us(options.message)} for each of its "
        f"{sum(point.at.peers.values())} messages (--message) beside its bytes",
        f"  the experts on one chunk, P and U cost {_us(options.launch)} beside their rows (--launch); starting an "
        f"exchange, and waiting for it, {_us(options.issue)} (--issue)",
        f"  compute is {options.compute_slowdown:g}x as slow beside an exchange (--compute-slowdown), an exchange "
        f"{options.wire_slowdown:g}x beside compute (--wire-slowdown)",
        "  backward has twice the FLOPs of forward"
        + (f"; attention over {options.sequence} tokens (--sequence)" if options.backbone is None else ""),
    ]
    return lines + _memory_bound(options, point)


def _gateways(options: PlanOptions, point: Prediction) -> str:
    """What those do who pass rows on inside their nodes."""
    (one, *_) = shapes(options, point.kind, point.at, distinct=True)
    assert one.distinct is not None and one.distinct.gateway is not None
    moved, seconds = sum(one.distinct.gateway.moved), sum(point.model.inside_s(one, "forward"))
    return (f"  compute waits for rows that are passed on inside nodes; a gateway reads and writes {in_mb(moved)} for "
            f"those and to add them up: {in_ms(seconds)} a phase in one chunk")  # fmt: skip


def _takes(options: PlanOptions, point: Prediction) -> str:
    """How long the agreement takes; nothing beside a cost model, which has it among what was measured."""
    if options.cost_model is not None:
        return ""
    seconds = agreement_s(options, point.at, distinct=point.deduplicated)
    return f", which takes {_us(seconds)} (--latency a round, --message)"


def _copies(options: PlanOptions, point: Prediction) -> list[str]:
    """From how many rows on an expert's weights had better travel than they."""
    if not point.at.peers or options.expert_offload is not None:  # of experts in host memory a layer has no copies
        return []
    phases: tuple[Phase, ...] = ("forward",) if options.phase == "infer" else ("forward", "backward")
    row_bytes, params = options.hidden * options.dtype_bytes, expert_params(options)
    costs = costs_of(point.model, phases, row_bytes=row_bytes, expert_params=params, param_bytes=options.dtype_bytes)
    found = break_even(costs, row_bytes=row_bytes, expert_params=params, param_bytes=options.dtype_bytes)
    lines = break_even_text([one for one in found if one.wire in point.at.peers])
    return ["Where an expert is wanted more than others:", *(f"  {line}" for line in lines)] if lines else []


def _rows_line(options: PlanOptions, point: Prediction) -> str:
    """Where the rows go."""
    if options.routing is None:
        most = busiest(options, point.kind, point.at)
        if most == 1:
            return "  every expert gets equally many rows"
        why = "the most there can be" if options.skew > most else "--skew, and experts that the ranks do not divide"
        return f"  the busiest rank has {most:.3g}x the mean rows ({why})"
    found = traffic_of(options, point.kind, point.at)
    return (
        f"  rows as in {Path(options.routing).name} (--routing): the most wanted expert has {found.max_over_mean:.2f}x "
        f"the mean, {100 * found.local_share:.0f} % of the choices stay on their node, {found.rows_per_token:.3g} of "
        f"{routed(options, point.kind)} a token go to other ranks"
    )


def _memory_bound(options: PlanOptions, point: Prediction) -> list[str]:
    """A warning where a chunk's experts read weights for longer than they compute."""
    phase = max(point.phases, key=lambda one: one.best.chunks if one.best.by == "tokens" else 1)
    chunks = phase.best.chunks if phase.best.by == "tokens" else 1
    read_s = local_experts(options, point.at) * weights_read_s(options)
    rows = options.tokens * routed(options, point.kind) * busiest(options, point.kind, point.at)
    matmul_s = point.model.experts.beta_s * rows / chunks
    if read_s <= matmul_s or not rows:
        return []
    part = f" of one of {chunks} chunks" if chunks > 1 else ""
    return [
        f"  WARNING: reading a rank's expert weights takes {in_ms(read_s)}, its matmuls{part} {in_ms(matmul_s)}: "
        "they are bound by memory, and matmuls of so few rows may not reach --flops"
    ]


def _kinds(points: dict[str, Prediction]) -> list[str]:
    """Every block pair at the point: they are different models with different bytes, so each has its own serial."""
    base = points.get("top2")
    rows = [("block pair", "serial ms", "planned ms", "x serial", "x serial top2", "comm", "bound ms", "schedule")]
    for kind, one in points.items():
        names = ("dedup: " if one.deduplicated else "") + " | ".join(phase.name for phase in one.phases)
        versus = "-" if base is None else f"{base.serial_s / one.time_s if one.time_s else 1:.2f}"
        rows.append((kind, f"{1e3 * one.serial_s:.3f}", f"{1e3 * one.time_s:.3f}", f"{one.speedup:.2f}", versus,
                     f"{100 * one.comm_share:.0f} %", f"{1e3 * one.bound_s:.3f}", names))  # fmt: skip
    lines = _aligned(rows)
    if base is not None:
        lines.append(
            "ScMoE and the shared expert are other models than top2 and send fewer bytes: compare like with like."
        )
    return lines


def _deduplication(options: PlanOptions, points: dict[str, Prediction]) -> list[str]:
    """What one row for each (token, rank) gives every block pair, and what it costs beside each row."""
    rows: list[tuple[str, ...]] = [
        ("deduplicated", "rows a token", "of plain", "beside a row", "plain ms", "dedup ms", "", "answer")
    ]
    for kind, one in points.items():
        found = _savings(options, one)
        beside = f"{found['metadata_out_bytes']}+{found['metadata_back_bytes']} B of {found['row_bytes']}"
        why = "no two experts of a token are on one rank" if found["rows_per_token"] else "no row leaves its rank"
        times = ["-", "", f"no: {why}"]
        if one.distinct is not None:
            percent = 100 * (total_s(one.distinct) / total_s(one.plain) - 1)
            times = [f"{1e3 * total_s(one.distinct):.3f}", f"{percent:+.1f} %", "yes" if one.deduplicated else "no"]
        elif one.model.distinct is None:
            times[2] = "no: not in the cost model, which moe-overlap calibrate --dedup gives"
        rows.append((kind, f"{found['distinct_rows_per_token']:.4g}", f"{found['rows_per_token']:.4g}", beside,
                     f"{1e3 * total_s(one.plain):.3f}", *times))  # fmt: skip
    whose = "expected where all sets of experts are equally likely" if options.routing is None else "of the routing"
    return [
        *_aligned(rows),
        f"Rows to other ranks, {whose}; beside a row: ids and weights (M), and the weights' gradients (Mt).",
    ]


def _savings(options: PlanOptions, one: Prediction) -> dict[str, float]:
    """What deduplication saves and costs, by the saved routing or by a uniform one: rows of a token to other ranks,
    bytes beside each."""
    top_k, group = routed(options, one.kind), one.at.group
    beside = metadata(options, one.kind)
    plain = top_k * (group - 1) / group
    if options.routing is not None:
        plain = traffic_of(options, one.kind, one.at).rows_per_token
    return {
        "rows_per_token": plain,
        "distinct_rows_per_token": distinct_rows(options, one.kind, one.at),
        "row_bytes": options.hidden * options.dtype_bytes,
        "metadata_out_bytes": beside.out,
        "metadata_back_bytes": beside.back,
    }


def _explained(points: dict[str, Prediction], point: Prediction) -> list[str]:
    """explain() of each phase; for ScMoE, a tap one op earlier is one of the things that could help."""
    wider = None
    if point.kind.startswith("scmoe"):
        wider = points.get(f"scmoe_pos{WINDOW_OPS[point.kind]}")
    texts = []
    for number, phase in enumerate(point.phases):
        changes = []
        if wider is not None:
            other = wider.phases[number]
            op = OP_NAMES[len(OP_NAMES) - WINDOW_OPS[wider.kind]]
            changes.append(Change(label=f"{wider.kind}: the experts read before {op}, another model",
                                  window=other.window, outside_s=other.outside_s))  # fmt: skip
        texts.append(explain(phase.window, phase.candidates, outside_s=phase.outside_s, changes=changes))
    return texts


def _map(found: Sweep, point: Prediction) -> list[str]:
    """The sweep as text: some of its rank counts, all of its bandwidths, and where overlap is worth something."""
    step = -(-len(found.ranks) // TEXT_COLUMNS)
    shown = [y for y in range(len(found.ranks)) if y % step == 0 or found.ranks[y] == point.ranks]
    rows = [("to other nodes", *(f"{found.ranks[y]} ranks" for y in shown))]
    for x, rate in enumerate(found.bandwidths):
        rows.append((rate_text(rate), *(f"{found.grid[y][x].speedup:.2f}x {found.grid[y][x].code}" for y in shown)))
    phases = "forward and backward" if len(point.phases) == 2 else "forward"
    lines = [f"{point.kind}, times faster than serial and the schedule that wins ({phases})", f"  {CODES}:"]
    lines += _aligned(rows)
    line = found.lines[point.kind]
    best = max(line, key=lambda one: one.speedup)
    worth = [one for one in line if one.speedup >= WORTH]
    said = f"On {point.ranks} ranks overlap gains most at {_rate(best)} ({best.speedup:.2f}x)"
    if worth:
        said += f", and at least {100 * (WORTH - 1):.0f} % from {_rate(worth[0])} to {_rate(worth[-1])}"
    return [*lines, said + ", of the bandwidths looked at."]


def _rate(one: Prediction) -> str:
    assert one.at.bytes_per_s is not None
    return rate_text(one.at.bytes_per_s)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _record(options: PlanOptions, points: dict[str, Prediction], found: Sweep | None) -> dict[str, Any]:
    """plan.json: the question, the cost model of the point, every block pair there, and the sweep."""
    point = points[options.kinds[0]]
    cost = agreement(options, point.at, distinct=point.deduplicated)
    record: dict[str, Any] = {
        "options": options.to_json(),
        "cost_model": point.model.to_json(),
        "point": [one.to_json() | _choices(options, one) for one in points.values()],
        "agreement": {"messages": cost.messages, "rounds": len(cost.rounds), "bytes": cost.bytes},
    }
    if options.tokens and options.cost_model is None:
        record["replicas"] = replica_record(options, point)
    if found is not None:
        record["grid"] = [one.to_json() for row in found.grid for one in row]
        record["kinds"] = [one.to_json() for line in found.lines.values() for one in line]
    return record


def _choices(options: PlanOptions, one: Prediction) -> dict[str, Any]:
    """What a block pair's entry says of its rows: with the saved routing, of that too."""
    found: dict[str, Any] = {}
    if options.routing is None or options.dedup != "off":
        found["deduplication"] = _savings(options, one)
    if options.routing is not None:
        found["routing"] = traffic_of(options, one.kind, one.at).to_json()
    return found


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} us"
