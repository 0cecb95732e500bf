"""Mutants of the deduplicated path: the published bugs of other exchanges that come nearest, planted in ours."""

from __future__ import annotations

from tests.verify.mutants import Mutant, mutant
from tests.verify.patching import Patch


def rows(old: str, new: str) -> Patch:
    return Patch("schedule.distinct_rows", old, new)


def maps(old: str, new: str) -> Patch:
    return Patch("schedule.distinct_maps", old, new)


SUM = "        sums: torch.Tensor = raw.combine(self.y, maps.places_RK[leaving], maps.weights_RK[leaving], None)\n"
OWN = "raw.combine(self.y, maps.places_RK[:own], maps.weights_RK[:own], None)"
OWN_GRADIENT = "raw.combine(self.dx, self._maps.places_RK[: self.plan.own_rows], None, None)"
RECEIVED = "torch.cat([received, own_RK])"

DEDUPLICATED: tuple[Mutant, ...] = (
    mutant("weights applied twice", "PaddlePaddle/PaddleFleet#1051", "output",
           rows(SUM, SUM.replace("weights_RK[leaving],", "weights_RK[leaving] ** 2,"))),
    mutant("own rows weighed twice", "PaddlePaddle/PaddleFleet#1051", "output",
           rows(OWN, OWN.replace("weights_RK[:own],", "weights_RK[:own] ** 2,"))),
    mutant("weights of another of the K experts", "sgl-project/sgl-kernel-npu#546", "output",
           maps("weights_TK.gather(1, self.choice_TK).index_select", "weights_TK.index_select")),
    mutant("own rows counted twice", "vllm-project/vllm#49378", "output", rows(OWN, f"2 * {OWN}")),
    mutant("own rows dropped", "vllm-project/vllm#49378", "output", rows(OWN, f"0 * {OWN}")),
    mutant("partial sums of the last chunk missing", "vllm-project/vllm-ascend#11921", "output",
           rows(SUM, SUM.replace("None)\n", "None) * (c + 1 < self.plan.chunks)\n"))),
    mutant("partial sums in the order of dispatch", "vllm-project/vllm-ascend#11921", "output",
           maps("self.ids_RK[self.distinct_order].amax(dim=1)",
                "torch.where(self.ids_RK >= 0, self.ids_RK, UNUSED)[self.distinct_order].amin(dim=1)"),
           attributes={"schedule": "chunked(2,experts)"}),
    mutant("one expert of a rank for each token", "vllm-project/vllm#46441", "output",
           rows(SUM, "        places_RK = maps.places_RK[leaving]\n"
                     "        places_RK = torch.where(places_RK == places_RK.amax(1, keepdim=True), places_RK, -1)\n"
                     + SUM.replace("maps.places_RK[leaving]", "places_RK"))),
    mutant("weights ignored in backward", "pytorch/torchtitan#1448", "gradients",
           rows("maps.row_R, maps.scale_R,", "maps.row_R, torch.ones_like(maps.scale_R),")),
    mutant("weight gradients of the router in the order of arrival", "huggingface/transformers#48205", "gradients",
           rows(RECEIVED, RECEIVED.replace("received,", "received.flip(0),"))),
    mutant("weight gradients of the router in the order of the slots", "huggingface/transformers#48205", "gradients",
           maps("torch.empty_like(sorted_TK).scatter_(1, self.choice_TK, sorted_TK)", "sorted_TK")),
    mutant("router gradient without other ranks' experts", "huggingface/transformers#48205", "gradients",
           rows(RECEIVED, RECEIVED.replace("received,", "0 * received,"))),
    mutant("router gradient without this rank's experts", "huggingface/transformers#48205", "gradients",
           rows(RECEIVED, RECEIVED.replace("own_RK]", "0 * own_RK]"))),
    mutant("input gradient without this rank's experts", "huggingface/transformers#48205", "gradients",
           rows(OWN_GRADIENT, f"0 * {OWN_GRADIENT}")),
    mutant("input gradient without the rows of the first chunk", "huggingface/transformers#48205", "gradients",
           rows("        return self._tokens.sum(self.dback)",
                "        self.dback[: self.plan.first_offsets[1]] = 0\n"
                "        return self._tokens.sum(self.dback)")),
    mutant("one row of each token summed, of those that came back", "vllm-project/vllm#46441", "output",
           maps("cumsum(dim=1) - 1, most), most)", "cumsum(dim=1) - 1, most), most)[:, :1].contiguous()")),
    mutant("h overwritten before it was read", "ByteDance-Seed/VeOmni#857", "gradients",
           rows("        self.a = workspace", "        self.dh.zero_()\n        self.a = workspace")),
    mutant("own rows leave their experts without gradient", "NVIDIA-NeMo/Automodel#2995", "gradients",
           rows("        self.dy[:own] = raw.pack(dy_TD, token_R[sent:])\n", "        self.dy[:own] = 0\n")),
)  # fmt: skip
