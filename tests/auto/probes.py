"""Synthetic probes: what a calibration would have measured of a step that costs what a known model says."""

from __future__ import annotations

from moe_overlap.auto.calibrate import distinct_shape, step_shape
from moe_overlap.auto.fit import Probe
from moe_overlap.planning.cost_model import CostModel
from moe_overlap.planning.shapes import MetadataBytes
from moe_overlap.planning.window import Slowdown
from moe_overlap.schedule.builders import SchedulePair, deduplicate, window
from tests.auto.planted import cost_model, exchange, line

ROW_BYTES = 100


BESIDE = MetadataBytes(out=40, back=20)


def seconds_of(model: CostModel, pair: SchedulePair, shape) -> dict[str, float]:
    """What each action of the step takes, by the model."""
    distinct, inside_s = shape.distinct, inside_of(model, shape)
    if distinct is not None:
        model = model.deduplicated
    wire_s = [
        model.exchange_s({lane: sizes[c] for lane, sizes in shape.bytes_by_lane.items()}) for c in range(shape.chunks)
    ]
    fixed = {"P": model.permute, "U": model.unpermute, "Ut": model.unpermute_backward, "Pt": model.permute_backward}
    rows = {"E": (model.experts, model.expert_s), "Ed": (model.experts_dgrad, model.expert_dgrad_s)}
    found = {}
    for action in [*pair.forward, *pair.backward]:
        verb, index = action.verb, action.index or 0
        if verb in fixed:
            found[action.text] = fixed[verb](shape.slots_rows)
        elif verb in rows:
            line_of_rows, expert_s = rows[verb]
            found[action.text] = line_of_rows(shape.rows[index]) + expert_s * shape.experts[index]
        elif verb in ("O", "Od"):
            line_of_rows, expert_s = rows["E" if verb == "O" else "Ed"]
            found[action.text] = line_of_rows(distinct.own_rows) + expert_s * distinct.own_experts
        elif verb in ("Hf", "Hb", "Hg"):
            copied = model.host_down if verb == "Hg" else model.host_up
            found[action.text] = copied(shape.experts[index] * shape.expert_bytes)
        elif verb == "Ew" and shape.expert_bytes:
            found[action.text] = model.experts_wgrad(shape.rows[index])
        elif verb == "Ew":
            found[action.text] = model.experts_wgrad(sum(shape.rows) + (distinct.own_rows if distinct else 0))
        elif verb in ("M", "Mt"):
            beside = distinct.metadata_by_lane if verb == "M" else distinct.gradients_by_lane
            found[action.text] = model.exchange_s(beside)
        elif verb in ("C", "Dt") and distinct is not None:
            found[action.text] = model.exchange_s({lane: n[index] for lane, n in distinct.back_by_lane.items()})
        elif action.lane == "wire":
            found[action.text] = wire_s[index]
        elif verb in ("S", "St"):
            found[action.text] = model.shared_s if verb == "S" else model.shared_backward_s
        else:
            found[action.text] = (model.backbone_s if verb == "B" else model.backbone_backward_s)[index]
    return {text: seconds + inside_s.get(text, 0.0) for text, seconds in found.items()}


def inside_of(model: CostModel, shape) -> dict[str, float]:
    """What exchanges inside the nodes take, by the action that they are part of."""
    if shape.distinct is None or shape.distinct.inside is None:
        return {}
    inside, line_of_bytes = shape.distinct.inside, model.distinct.inside
    sizes = {"M": inside.metadata, "Mt": inside.gradients}
    for verb, of_chunks in (("D", inside.out), ("C", inside.back), ("Ct", inside.out), ("Dt", inside.back)):
        sizes |= {f"{verb}{c}": size for c, size in enumerate(of_chunks)}
    return {text: line_of_bytes(size) for text, size in sizes.items()}


def probe(model: CostModel, chunks: int, *, pair_of=None, noise=lambda s: s, hidden_s=0.0, compute_s=0.0, plan=None,
          by="tokens", waited_s=0.0, nodes=None, distinct=False, expert_bytes=0):  # fmt: skip
    cut = (plan or exchange()).chunked(chunks, by)
    shape = step_shape(cut, row_bytes=ROW_BYTES, nodes=nodes, joined=True, expert_bytes=expert_bytes)
    pair = (pair_of or (lambda chunks: window(2, 1, chunks=chunks)))(chunks)
    if distinct:
        shape = distinct_shape(cut, row_bytes=ROW_BYTES, nodes=nodes, joined=True, metadata=BESIDE)
        pair = deduplicate(pair)
    seconds = {text: noise(s) for text, s in seconds_of(model, pair, shape).items()}
    known = model.deduplicated if distinct else model
    forward_s, backward_s = (2 * model.issue_s * sum(action.lane != "comp" for action in half)
                             for half in (pair.forward, pair.backward))  # fmt: skip
    host_s = {"forward": known.outside_s + forward_s, "backward": known.outside_backward_s + backward_s}
    forward = {action.text for action in pair.forward}
    whole_s = {"forward": sum(s for text, s in seconds.items() if text in forward) + host_s["forward"]}
    whole_s["backward"] = sum(seconds.values()) - whole_s["forward"] + host_s["forward"] + host_s["backward"]
    return Probe(pair=pair, seconds=seconds, host_s=host_s, whole_s=whole_s, hidden_s=hidden_s, compute_s=compute_s,
                 waited_s=waited_s, shape=shape, inside_s=inside_of(model, shape))  # fmt: skip


TRUE = cost_model(
    2,
    alpha_s=3e-5,
    experts=line(2e-7, 4e-6),
    expert_s=1.5e-5,
    experts_dgrad=line(3e-7, 5e-6),
    expert_dgrad_s=2.5e-5,
    permute=line(1e-8),
    unpermute=line(2e-8),
    unpermute_backward=line(3e-8),
    permute_backward=line(4e-8),
    backbone_s=(1e-4, 2e-4),
    backbone_backward_s=(3e-4, 5e-4),
    outside_s=5e-5,
    outside_backward_s=7e-5,
    issue_s=2e-6,
    slowdown=Slowdown(compute=1.25),
)
