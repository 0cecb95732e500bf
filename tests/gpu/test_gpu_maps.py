"""gate_topk and row_map against the references: ids and maps bit for bit."""

from __future__ import annotations

import pytest
import torch

from moe_overlap.ops import gate
from tests.gpu.both import cpu, kernel, reference
from tests.tolerances import close

pytestmark = pytest.mark.gpu

F32, I32 = torch.float32, torch.int32
EXPERTS = (1, 2, 3, 7, 8, 16, 31, 32, 33, 64, 65, 72, 128, 160, 256, 257, 384, 512, 1000, 1024)
CASES = 2000  # for each score and for the maps: 10,000 with the backward


def randint(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def gate_case(seed: int, score: str) -> tuple:
    """Arguments of gate_topk. Logits lie on a grid: values are equal or well apart, and ties are frequent."""
    g = torch.Generator().manual_seed(seed)
    experts = EXPERTS[randint(0, len(EXPERTS) - 1, g)]
    groups = [n for n in (1, 2, 4, 8) if experts % n == 0 and experts // n >= 2] or [1]
    n_group = groups[randint(0, len(groups) - 1, g)] if seed % 3 == 0 else 1
    topk_group = randint(1, n_group, g)
    k = randint(1, min(16, experts // n_group * topk_group), g)
    tokens = randint(0, 40, g)
    biased = seed % 2 == 1
    reach = 16 if biased else 64
    logits_TE = torch.randint(-reach, reach + 1, (tokens, experts), generator=g).to(F32) / 16
    if seed % 4 == 1 and tokens:
        bad = (float("nan"), float("inf"), float("-inf"))[seed % 3]
        logits_TE[randint(0, tokens - 1, g), randint(0, experts - 1, g)] = bad
        logits_TE[randint(0, tokens - 1, g)] = float("-inf")
    # Scores are then apart by more than a sum with such a bias rounds off.
    bias_E = torch.randint(-4, 5, (experts,), generator=g).to(F32) * 2 if biased else None
    return logits_TE, bias_E, k, n_group, topk_group, score, seed % 5 < 2, 1.0 if seed % 7 else 2.5


@pytest.mark.covers("gate_topk", F32)
@pytest.mark.parametrize("score", gate.SCORES)
def test_gate_ids_and_counts_are_the_references(score: str, poison: None) -> None:
    for seed in range(CASES):
        arguments = gate_case(seed, score)
        got, want = cpu(kernel("gate_topk", *arguments)), reference("gate_topk", *arguments)
        for name, have, should in zip(("ids", "counts", "status"), got[1:], want[1:], strict=True):
            assert torch.equal(have, should), f"seed {seed}: {name}"
        close(got[0], want[0])


@pytest.mark.covers("gate_topk_backward", F32)
@pytest.mark.parametrize("score", gate.SCORES)
def test_gate_gradient_is_the_float64_one(score: str, poison: None) -> None:
    for seed in range(CASES // 4):
        logits_TE, _, _, _, _, _, renormalize, scale = arguments = gate_case(seed, score)
        ids_TK = reference("gate_topk", *arguments)[1]
        dweights_TK = torch.randn(ids_TK.shape, generator=torch.Generator().manual_seed(seed))
        how = (ids_TK, score, renormalize, scale)
        (got,) = cpu(kernel("gate_topk_backward", dweights_TK, logits_TE, *how))
        (want,) = reference("gate_topk_backward", dweights_TK.double(), logits_TE.double(), *how)
        close(got, want)


def row_map_case(seed: int) -> tuple:
    g = torch.Generator().manual_seed(seed)
    experts = EXPERTS[randint(0, len(EXPERTS) - 1, g)]
    tokens, k = randint(0, 300, g), randint(1, 16, g)
    if seed % 50 == 0:
        tokens = 9000  # several blocks
    ids_TK = torch.randint(-1, experts, (tokens, k), generator=g, dtype=I32)
    if seed % 6 == 0:
        ids_TK.fill_(randint(-1, experts - 1, g))
    if seed % 6 == 1:
        ids_TK = ids_TK.clamp(max=experts // 2)
    first = randint(0, experts, g) if seed % 3 == 0 else 0
    last = randint(first, experts, g) if seed % 3 == 0 else experts
    align = (1, 1, 8, 128)[seed % 4]
    return ids_TK, experts, first, last, align, randint(0, 40, g) if seed % 5 == 0 else None


@pytest.mark.covers("row_map", I32)
def test_maps_are_the_references(poison: None) -> None:
    for seed in range(2 * CASES):
        arguments = row_map_case(seed)
        got, want = cpu(kernel("row_map", *arguments)), reference("row_map", *arguments)
        for name, have, should in zip(("counts", "offs", "slot_to_row", "row_to_slot"), got, want, strict=True):
            assert torch.equal(have, should), f"seed {seed}: {name}"


@pytest.mark.covers("row_map", I32)
def test_map_of_2_to_the_24_slots() -> None:
    ids_TK = torch.randint(-1, 256, (1 << 21, 8), generator=torch.Generator().manual_seed(0), dtype=I32)
    got, want = cpu(kernel("row_map", ids_TK, 256, 0, 256, 1, None)), reference("row_map", ids_TK, 256, 0, 256, 1, None)
    assert all(torch.equal(have, should) for have, should in zip(got, want, strict=True))
