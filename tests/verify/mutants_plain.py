"""Mutants of the plain layer and of the recipe around it. A bug that is the same on one rank and on
n is one of no parallelism: where the reported one was in the parallel path alone, so is the patch."""

from __future__ import annotations

from tests.verify.mutants import RECIPE, Mutant, mutant, recipe
from tests.verify.patching import Patch

CAPACITY = {"options": {"aux_coef": 0.01, "capacity_factor": 0.8}}


def layer(old: str, new: str) -> Patch:
    return Patch("verify.adapters.plain_layer", old, new)


def adapter(old: str, new: str) -> Patch:
    return Patch("verify.adapters.plain", old, new)


STEP: tuple[Mutant, ...] = (
    mutant(
        "norm averaged over the ranks",
        "deepspeedai/DeepSpeed#8475",
        "norm and clip",
        adapter(
            'norm = (self.module.sum_over_ranks(squares["experts"]) + squares["dense"]).sqrt()',
            'norm = self.module.sum_over_ranks((squares["experts"] + squares["dense"]).sqrt()) / self.module.ranks',
        ),
    ),
    mutant(
        "norm of this rank's experts alone",
        "NVIDIA-NeMo/Automodel#3816",
        "norm and clip",
        adapter('self.module.sum_over_ranks(squares["experts"])', 'squares["experts"]'),
    ),
    mutant(
        "norm without experts",
        "NVIDIA/Megatron-LM#5916",
        "norm and clip",
        adapter('(self.module.sum_over_ranks(squares["experts"]) + squares["dense"])', 'squares["dense"]'),
    ),
    mutant(
        "norm counts dense gradients once a rank",
        "NVIDIA/Megatron-LM#2263",
        "norm and clip",
        adapter(
            'self.module.sum_over_ranks(squares["experts"]) + squares["dense"]',
            'self.module.sum_over_ranks(squares["experts"] + squares["dense"])',
        ),
    ),
    mutant(
        "clip skipped",
        "huggingface/trl#5712",
        "norm and clip",
        adapter(
            "            grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))\n",
            "            pass\n",
        ),
    ),
    mutant(
        "clip leaves experts alone",
        "huggingface/trl#5712",
        "norm and clip",
        adapter(
            "        for grad in gradients.values():\n",
            '        for grad in (g for name, g in gradients.items() if self.kind_of(name) != "experts"):\n',
        ),
    ),
    mutant(
        "step before the gradients are averaged",
        "NVIDIA/Megatron-LM#599",
        "AdamW step",
        recipe(
            "        ranks = size_of(self.group)\n        for name, parameter",
            "        ranks = size_of(self.group)\n"
            "        early = {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}\n"
            "        self.early = {n: grad.clone() for n, grad in early.items()}\n"
            "        for name, parameter",
        ),
        adapter(
            "        self._optimizer.step()\n",
            "        for name, parameter in self.module.named_parameters():\n"
            "            parameter.grad = self.early.get(name)\n"
            "        self._optimizer.step()\n",
        ),
    ),
    mutant(
        "a model that never trains",
        "NVIDIA-NeMo/Automodel#3701",
        "training",
        adapter("lr=self.learning_rate", "lr=0.0"),
    ),
    mutant(
        "experts missing in the optimizer",
        "unslothai/unsloth#6936",
        "training | AdamW step",
        adapter(
            "torch.optim.AdamW(self.module.parameters(), lr",
            'torch.optim.AdamW([p for n, p in self.module.named_parameters() if "expert" not in n], lr',
        ),
    ),
)

CHECKPOINTS: tuple[Mutant, ...] = (
    mutant(
        "one rank's experts saved",
        "KempnerInstitute/KempnerForge#202",
        "save, reshard, load",
        adapter("range(self.module.rank * count, (self.module.rank + 1) * count)", "range(count)"),
    ),
    mutant(
        "optimizer state of one rank saved",
        "huggingface/nanotron#107",
        "save, reshard, load",
        adapter(
            'parts = [f"{name}.{expert}" for expert in self._held()]',
            'parts = [f"{name}.{n}" for n in (range(len(tensor)) if "exp_avg" in name else self._held())]',
        ),
    ),
    mutant(
        "optimizer state not saved",
        "EvolvingLMMs-Lab/OneVision-Encoder#65",
        "save, reshard, load",
        adapter(
            "        for name, parameter in self.module.named_parameters():\n            state",
            "        for name, parameter in ():\n            state",
        ),
    ),
    mutant(
        "step count of the optimizer lost",
        "EvolvingLMMs-Lab/OneVision-Encoder#65",
        "save, reshard, load",
        adapter("for key, value in state.items()}", 'for key, value in state.items() if key != "step"}'),
    ),
    mutant(
        "shards loaded in another order of ranks",
        "vllm-project/vllm#27025",
        "save, reshard, load",
        adapter(
            'parts = [f"{name}.{expert}" for expert in self._held()]',
            'parts = [f"{name}.{(n + len(tensor)) % self.experts}" for n in self._held()]',
        ),
    ),
    mutant(
        "selection bias not saved",
        "pytorch/torchtitan#1222",
        "save, reshard, load",
        adapter("found = dict(self._tensors())", 'found = {n: t for n, t in self._tensors().items() if n != "bias"}'),
    ),
)

ROUTING: tuple[Mutant, ...] = (
    mutant(
        "weights not normalised",
        "pytorch/torchtitan#1448",
        "routing | output",
        layer(
            "        if self.normalize:\n",
            "        if self.normalize and self.ranks == 1:\n",
        ),
    ),
    mutant(
        "selection bias in the weights",
        "PaddlePaddle/PaddleFormers#3452",
        "routing | output | AdamW step | save, reshard, load",
        layer(
            "weights_TK = probs_TE.gather(1, ids_TK)",
            "weights_TK = (probs_TE + (self.bias if self.ranks > 1 else 0)).gather(1, ids_TK)",
        ),
    ),
    mutant(
        "selection bias left behind",
        "deepspeedai/DeepSpeed#8358",
        "routing | output | AdamW step | save, reshard, load",
        layer("(probs_TE.detach() + self.bias)", "(probs_TE.detach() + (self.bias if self.ranks == 1 else 0))"),
    ),
    mutant(
        "bias update from this rank's counts",
        "pytorch/torchtitan#1114",
        "AdamW step",
        layer("self.counts += counts_E", "self.counts += torch.bincount(ids_TK.flatten(), minlength=self.experts)"),
    ),
    mutant(
        "counts taken again in the recompute",
        "pytorch/torchtitan#1593",
        "recompute",
        layer("if self.training and not self._again:", "if self.training:"),
    ),
    mutant(
        "counts taken in evaluation",
        "pytorch/torchtitan#4148",
        "evaluation",
        layer("if self.training and not self._again:", "if not self._again:"),
    ),
    mutant(
        "capacity and drops of each rank for itself",
        "microsoft/Tutel#250",
        "routing",
        layer(
            "sizes = self.gather(torch.tensor([ids_TK.numel()]), [1] * self.ranks).tolist()", "sizes = [ids_TK.numel()]"
        ),
        layer("(self.gather(t.detach().flatten(), sizes) for t in", "(t.detach().flatten() for t in"),
        layer("keep_S.split(sizes)[self.rank]", "keep_S.split(sizes)[0]"),
        attributes=CAPACITY,
    ),
    mutant(
        "capacity from this rank's tokens, unless a rank has none",
        "microsoft/Tutel#250",
        "uneven tokens",
        layer(
            "self.capacity_factor * len(ids_S)",
            "self.capacity_factor * (ids_TK.numel() * self.ranks if min(sizes) else len(ids_S))",
        ),
        attributes=CAPACITY,
    ),
    mutant(
        "drops in the order of each rank's tokens",
        "deepseek-ai/DeepSeek-V2#48",
        "routing",
        layer(
            "order_S = weights_S.argsort(descending=True, stable=True)",
            "order_S = torch.cat([torch.arange(size) for size in sizes]).argsort(stable=True)",
        ),
        attributes=CAPACITY,
    ),
    mutant(
        "router detached by an exchange",
        "NVIDIA-NeMo/Automodel#2995",
        "gradients",
        layer(
            "weighted = back * weights_TK.flatten()[kept_S, None]",
            "weighted = back * (weights_TK.detach() if self.ranks > 1 else weights_TK).flatten()[kept_S, None]",
        ),
    ),
    mutant(
        "router without gradient",
        "davidmrau/mixture-of-experts#27",
        "training",
        layer("weighted = back * weights_TK", "weighted = back * weights_TK.detach()"),
        attributes={"options": {}},
    ),
)

LOSS: tuple[Mutant, ...] = (
    mutant(
        "auxiliary loss from this rank's counts",
        "pytorch/torchtitan#2061",
        "auxiliary loss",
        layer(
            "aux = self._aux_loss(probs_TE, counts_E)",
            "aux = self._aux_loss(probs_TE, torch.bincount(ids_TK.flatten(), minlength=self.experts))",
        ),
    ),
    mutant(
        "auxiliary loss without gradient",
        "NVIDIA-NeMo/Automodel#1408",
        "auxiliary loss",
        layer(
            "(f_E * probs_TE.sum(dim=0) * self.ranks",
            "(f_E * (probs_TE if self.ranks == 1 else probs_TE.detach()).sum(dim=0) * self.ranks",
        ),
    ),
    mutant(
        "auxiliary loss without gradient under recompute",
        "NVIDIA-NeMo/Automodel#1408",
        "recompute",
        layer("        return result\n", "        return result[0], result[1].detach()\n"),
    ),
    mutant(
        "auxiliary loss divided by the ranks",
        "NVIDIA-NeMo/Automodel#1412",
        "auxiliary loss",
        layer("* self.ranks / tokens", "/ tokens"),
    ),
    mutant(
        "means over this rank's tokens: NaN where there are none",
        "huggingface/transformers#48205",
        "a rank without tokens | auxiliary loss",
        layer("probs_TE.sum(dim=0) * self.ranks / tokens", "probs_TE.mean(dim=0)"),
    ),
)

ROWS: tuple[Mutant, ...] = (
    mutant(
        "weights applied twice",
        "PaddlePaddle/PaddleFleet#1051",
        "output",
        layer(
            "weighted = back * weights_TK.flatten()[kept_S, None]",
            "weighted = back * weights_TK.flatten()[kept_S, None] ** (2 if self.ranks > 1 else 1)",
        ),
    ),
    mutant(
        "weights applied before the experts",
        "ByteDance-Seed/VeOmni#1199",
        "output",
        layer(
            "rows = self._exchange(x_TD[token_R], send, recv)",
            "weight_R = weights_TK.flatten()[kept_S, None]\n"
            "        early_R = weight_R if self.ranks > 1 else 1\n"
            "        rows = self._exchange(x_TD[token_R] * early_R, send, recv)",
        ),
        layer(
            "weighted = back * weights_TK.flatten()[kept_S, None]",
            "weighted = back if self.ranks > 1 else back * weight_R",
        ),
    ),
    mutant(
        "rows returned in another order",
        "vllm-project/vllm-ascend#11921",
        "output",
        layer("torch.cat(outputs)[order.argsort()]", "torch.cat(outputs)[order]"),
    ),
    mutant(
        "rows computed by another expert of the rank",
        "vllm-project/vllm-gaudi#1796",
        "output",
        layer(
            "for x_RD, up_FD, down_DF in zip(of_expert, self.expert_up, self.expert_down, strict=True)",
            "for x_RD, up_FD, down_DF in zip(of_expert, self.expert_up.roll(self.rank, 0), self.expert_down)",
        ),
    ),
    mutant(
        "shared expert once for each rank",
        "vllm-project/vllm#49378",
        "output",
        layer("y_TD = y_TD + self.shared_down(", "y_TD = y_TD + self.ranks * self.shared_down("),
    ),
    mutant(
        "input gradient without the experts",
        "huggingface/transformers#48205",
        "gradients",
        layer(
            "rows = self._exchange(x_TD[token_R], send, recv)",
            "rows = self._exchange((x_TD.detach().requires_grad_() if self.ranks > 1 else x_TD)[token_R], send, recv)",
        ),
    ),
    mutant(
        "input gradient without other ranks' experts",
        "huggingface/transformers#48205",
        "gradients",
        layer(
            "        return back, None, None, None\n",
            "        keep = torch.zeros(len(back), 1)\n"
            "        first = sum(send[: dist.get_rank(group)])\n"
            "        keep[first : first + send[dist.get_rank(group)]] = 1\n"
            "        return back * keep, None, None, None\n",
        ),
    ),
    mutant(
        "a rank without rows leaves its experts without gradient",
        "NVIDIA-NeMo/Automodel#2995",
        "idle experts",
        layer(
            "zip(of_expert, self.expert_up, self.expert_down",
            "zip(of_expert, *(w if len(rows) else w.detach() for w in (self.expert_up, self.expert_down))",
        ),
    ),
    mutant(
        "counts of the last call kept for every backward",
        "ByteDance-Seed/VeOmni#857",
        "two forwards",
        layer(
            "        send, recv = send_We.sum(1).tolist(), recv_We.sum(1).tolist()\n",
            '        send, recv = self.__dict__.setdefault("kept", ([], []))\n'
            "        send[:], recv[:] = send_We.sum(1).tolist(), recv_We.sum(1).tolist()\n",
        ),
    ),
    mutant(
        "experts that never train",
        "unslothai/unsloth#11014",
        "training",
        layer(
            "zip(of_expert, self.expert_up, self.expert_down",
            "zip(of_expert, self.expert_up.detach(), self.expert_down.detach()",
        ),
    ),
    mutant(
        "gradients of experts rounded to bfloat16",
        "ISEEKYAN/Megatron-LM#153",
        "gradients",
        layer(
            "        self._again = False\n\n    def forward",
            "        self._again = False\n"
            "        if self.ranks > 1:\n"
            "            self.expert_up.register_hook(lambda grad: grad.bfloat16().to(grad.dtype))\n\n"
            "    def forward",
        ),
    ),
    mutant(
        "the second micro-batch overwrites the first",
        "NVIDIA/Megatron-LM#6279",
        "two micro-batches",
        layer(
            "        probs_TE, ids_TK, weights_TK = self.route(x_TD)\n        counts_E",
            "        probs_TE, ids_TK, weights_TK = self.route(x_TD)\n"
            "        if self.ranks > 1:\n"
            "            self.expert_up.grad = self.expert_down.grad = None\n"
            "        counts_E",
        ),
    ),
    mutant(
        "sums in the order of arrival",
        "unslothai/unsloth-zoo#1258",
        "determinism",
        layer("import math\n", "import math\nimport time\n"),
        layer(
            "        kept_S = keep_TK.flatten().nonzero().flatten()\n",
            "        kept_S = keep_TK.flatten().nonzero().flatten()\n"
            "        chance = torch.Generator().manual_seed(time.time_ns())\n"
            "        kept_S = kept_S[torch.randperm(len(kept_S), generator=chance)]\n",
        ),
    ),
    mutant(
        "the recompute weights otherwise",
        "NVIDIA-NeMo/Automodel#2635",
        "recompute",
        layer(
            "y_TD = self._routed(x_TD, ids_TK, weights_TK, keep_TK)",
            "y_TD = self._routed(x_TD, ids_TK, weights_TK * (1.01 if self._again else 1), keep_TK)",
        ),
    ),
    mutant(
        "a rank without tokens leaves its experts without gradient",
        "NVIDIA-NeMo/Automodel#2995",
        "a rank without tokens",
        layer(
            "zip(of_expert, self.expert_up, self.expert_down",
            "zip(of_expert, *(w if len(x_TD) else w.detach() for w in (self.expert_up, self.expert_down))",
        ),
    ),
)

PLAIN = (*RECIPE, *STEP, *CHECKPOINTS, *ROUTING, *LOSS, *ROWS)
