"""Mutants of our layer. The layer of one rank runs on a path of its own, so that most patches act on n ranks alone."""

from __future__ import annotations

from dataclasses import replace

from tests.verify.mutants import Mutant, mutant
from tests.verify.patching import Patch


def layer(old: str, new: str) -> Patch:
    return Patch("layer.layer", old, new)


def rows(old: str, new: str) -> Patch:
    return Patch("schedule.rows", old, new)


def backward(old: str, new: str) -> Patch:
    return Patch("schedule.backward", old, new)


def adapter(old: str, new: str) -> Patch:
    return Patch("verify.adapters.ours", old, new)


def clip(old: str, new: str) -> Patch:
    return Patch("parallel.clip", old, new)


GIVE = "step.give(rows_TD, routing.topk_ids_TK, weights_TK, entered=late is None)"
COMBINE = "raw.combine(self.back, self.slot_to_row, self._weights_TK, None)"
BACK = "        back = self._back_in_order()\n"
OTHERS_ROWS = """        first = sum(self.plan.send_counts[0][: self.plan.rank])
        last = first + self.plan.send_counts[0][self.plan.rank]
"""
WGRAD = "            raw.expert_mlp_wgrad(Wgrad(self.saved.x, self.dy, self.dh, self.a, offs"

SCALES: tuple[Mutant, ...] = (
    mutant(
        "expert gradients EP times too large",
        "pytorch/pytorch#160285",
        "gradients",
        Patch("parallel.ownership", "1.0 / self.transport.world_size if self.mean", "1.0 if self.mean"),
    ),
    mutant(
        "expert gradients divided by EP twice",
        "databricks/megablocks#86",
        "gradients",
        Patch("parallel.ownership", "1.0 / self.transport.world_size if", "1.0 / self.transport.world_size**2 if"),
    ),
    mutant(
        "one of the experts' weights left without 1/EP",
        "NVIDIA/Megatron-LM#7160",
        "gradients",
        backward("            dw_out.mul_(self._grad_scale)\n", ""),
    ),
    mutant(
        "gradients of experts rounded to bfloat16",
        "ISEEKYAN/Megatron-LM#153",
        "gradients",
        backward(
            "        return dw_in, dw_out\n",
            "        return tuple(w if w is None else w.bfloat16().to(w.dtype) for w in (dw_in, dw_out))\n",
        ),
    ),
    mutant(
        "the second micro-batch overwrites the first",
        "NVIDIA/Megatron-LM#6279",
        "two micro-batches",
        layer(
            "            agreement = self.dispatcher.begin(",
            "            self.experts.zero_grad()\n            agreement = self.dispatcher.begin(",
        ),
    ),
    mutant(
        "sums in the order of arrival",
        "unslothai/unsloth-zoo#1258",
        "determinism",
        rows("from dataclasses import dataclass\n", "import time\nfrom dataclasses import dataclass\n"),
        rows(
            WGRAD,
            "            chance = torch.Generator().manual_seed(time.time_ns())\n"
            "            order = torch.randperm(len(self.dy), generator=chance)\n"
            "            expert = torch.bucketize(order, offs.long(), right=True)\n"
            "            order = order[expert.argsort(stable=True)]\n"
            "            x, dy, dh, a = (t[order] for t in (self.saved.x, self.dy, self.dh, self.a))\n"
            "            raw.expert_mlp_wgrad(Wgrad(x, dy, dh, a, offs",
        ),
    ),
)

ROUTER: tuple[Mutant, ...] = (
    mutant(
        "router detached by an exchange",
        "NVIDIA-NeMo/Automodel#2995",
        "gradients",
        layer(GIVE, GIVE.replace("weights_TK", "weights_TK.detach()")),
    ),
    mutant(
        "router gradient without other ranks' experts",
        "huggingface/transformers#48205",
        "gradients",
        rows(
            BACK,
            OTHERS_ROWS
            + "        back = self._back_in_order().clone()\n        back[:first] = 0\n        back[last:] = 0\n",
        ),
    ),
    mutant(
        "weights normalised under EP alone",
        "pytorch/torchtitan#1448",
        "output",
        layer(
            GIVE,
            f"weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)\n            {GIVE}",
        ),
    ),
    mutant(
        "the recompute weights otherwise",
        "NVIDIA-NeMo/Automodel#2635",
        "recompute",
        layer(GIVE, GIVE.replace("weights_TK", 'weights_TK * (1.01 if step.phase == "recompute" else 1)')),
    ),
    mutant(
        "auxiliary loss without gradient",
        "NVIDIA-NeMo/Automodel#1408",
        "auxiliary loss",
        Patch(
            "layer.last_call",
            "loss=loss, tail=tail",
            "loss=None if loss is None else loss.detach() + 0 * y_TD.sum(), tail=tail",
        ),
    ),
)

ROWS: tuple[Mutant, ...] = (
    mutant(
        "weights applied twice",
        "PaddlePaddle/PaddleFleet#1051",
        "output",
        rows(COMBINE, COMBINE.replace("_weights_TK", "_weights_TK**2")),
    ),
    mutant(
        "weights of another of the K experts",
        "sgl-project/sgl-kernel-npu#546",
        "output",
        rows(COMBINE, COMBINE.replace("_weights_TK", "_weights_TK.flip(1)")),
    ),
    mutant(
        "rows returned in another order",
        "vllm-project/vllm-ascend#11921",
        "output",
        rows(
            "return self._take(self.y, c)",
            'return raw.pack(self.y, self.tables.one("buffer_order", c).sort().values)',
        ),
    ),
    mutant(
        "experts placed under another rank's numbers",
        "vllm-project/vllm#46441",
        "output",
        layer(
            "            agreement = self.dispatcher.begin(",
            "            p, ids_TK = self.dispatcher.placement, routing.topk_ids_TK\n"
            "            moved_TK = (ids_TK + p.slots_per_rank) % p.num_slots\n"
            "            vars(routing).update(topk_ids_TK=torch.where(ids_TK >= 0, moved_TK, ids_TK))\n"
            "            agreement = self.dispatcher.begin(",
        ),
    ),
    mutant(
        "shared expert once for each rank",
        "vllm-project/vllm#49378",
        "output",
        Patch(
            "layer.last_call",
            "y_TD if shared_TD is None else y_TD + ",
            "y_TD if shared_TD is None else y_TD + self.transport.world_size * ",
        ),
    ),
    mutant(
        "input gradient without the experts",
        "huggingface/transformers#48205",
        "gradients",
        backward('"x": g.dx_TD() if', '"x": 0 * g.dx_TD() if'),
    ),
    mutant(
        "input gradient without other ranks' experts",
        "huggingface/transformers#48205",
        "gradients",
        rows(
            "        dx_TD: torch.Tensor = raw.combine(self.dsend, self.saved.slot_to_dback",
            OTHERS_ROWS
            + "        self.dsend[:first] = 0\n        self.dsend[last:] = 0\n"
            + "        dx_TD: torch.Tensor = raw.combine(self.dsend, self.saved.slot_to_dback",
        ),
    ),
    mutant(
        "input gradient without the router",
        "huggingface/transformers#48687",
        "gradients",
        Patch("schedule.nodes", "sum_in_order(dx_rows, *grads[:-1])", "sum_in_order(dx_rows, *grads[1:-1])"),
    ),
    mutant(
        "a rank without rows leaves its experts without gradient",
        "NVIDIA-NeMo/Automodel#2995",
        "idle experts",
        backward("        if g is None:\n", "        if g is None or not len(g.saved.x):\n"),
    ),
    mutant(
        "one buffer for the rows of every call",
        "ByteDance-Seed/VeOmni#857",
        "two forwards",
        rows("\n\nclass ForwardRows", "\n\nBUFFERS = {}\n\n\nclass ForwardRows"),
        rows(
            "        self.h = workspace.empty((rows, weights.w_in.shape[1]), like=x_TD)\n",
            "        shape = (rows, weights.w_in.shape[1])\n"
            '        kept = BUFFERS.setdefault("h", x_TD.new_empty(1 << 20))\n'
            "        self.h = kept.data[: shape[0] * shape[1]].view(shape)\n",
        ),
    ),
    mutant(
        "experts that never train",
        "unslothai/unsloth#11014",
        "training",
        layer("tokens.enter(step, w_in, w_out)", "tokens.enter(step, w_in.detach(), w_out.detach())"),
        Patch(
            "layer.one_rank",
            "way.expert_mlp(x_RD, w_in, w_out, offs",
            "way.expert_mlp(x_RD, w_in.detach(), w_out.detach(), offs",
        ),
    ),
    mutant(
        "the last expert of each rank never trains",
        "unslothai/unsloth#6936",
        "gradients | training",
        backward("homes * (group + 1) // groups\n", "homes * (group + 1) // groups - (group + 1 == groups)\n"),
        rows("workspace.empty(saved.w_in.shape, like=saved.w_in, rows=False)", "torch.zeros_like(saved.w_in)"),
        rows("workspace.empty(saved.w_out.shape, like=saved.w_out, rows=False)", "torch.zeros_like(saved.w_out)"),
    ),
    mutant(
        "a rank without tokens leaves its experts without gradient",
        "NVIDIA-NeMo/Automodel#2995",
        "a rank without tokens",
        rows(
            '            offs = self.tables.one("expert_offs")[: self.dw_in.shape[0]]\n',
            "            if not len(self.saved.slot_to_row):\n"
            "                self.dw_in.zero_(), self.dw_out.zero_()\n"
            "                return\n"
            '            offs = self.tables.one("expert_offs")[: self.dw_in.shape[0]]\n',
        ),
    ),
)

RECIPE: tuple[Mutant, ...] = (
    mutant(
        "dense gradients summed, not averaged",
        "ByteDance-Seed/VeOmni#184",
        "gradients",
        adapter("                parameter.grad /= size_of(self.group)\n", ""),
    ),
    mutant(
        "router gradient of this rank's tokens alone",
        "pytorch/torchtitan#2387",
        "gradients",
        adapter('self.kind_of(name) != "experts":', 'self.kind_of(name) not in ("experts", "router"):'),
    ),
    mutant(
        "dense gradients averaged over one rank",
        "NVIDIA/Megatron-LM#5916",
        "gradients",
        adapter("                dist.all_reduce(parameter.grad, group=self.group)\n", ""),
        adapter("                parameter.grad /= size_of(self.group)\n", ""),
    ),
    mutant(
        "different experts averaged over the ranks",
        "microsoft/Swin-Transformer#223",
        "gradients",
        adapter('if self.group is not None and self.kind_of(name) != "experts":', "if self.group is not None:"),
    ),
    mutant("a model that never trains", "NVIDIA-NeMo/Automodel#3701", "training", adapter("lr=1e-2", "lr=0.0")),
    mutant(
        "experts missing in the optimizer",
        "unslothai/unsloth#6936",
        "training",
        adapter(
            "torch.optim.AdamW(self.module.parameters(), lr",
            'torch.optim.AdamW([p for n, p in self.module.named_parameters() if "experts." not in n], lr',
        ),
    ),
    mutant(
        "step before the gradients are averaged",
        "NVIDIA/Megatron-LM#599",
        "AdamW step",
        adapter(
            "        for name, parameter in self.module.named_parameters():\n            if self.group is not None and",
            "        self.early = [p.grad.clone() for p in self.module.parameters()]\n"
            "        for name, parameter in self.module.named_parameters():\n            if self.group is not None and",
        ),
        adapter(
            "        self._optimizer().step()\n",
            "        for parameter, grad in zip(self.module.parameters(), self.early):\n"
            "            parameter.grad = grad\n"
            "        self._optimizer().step()\n",
        ),
    ),
)

NORM: tuple[Mutant, ...] = (
    mutant(
        "norm averaged over the ranks",
        "deepspeedai/DeepSpeed#8475",
        "norm and clip",
        clip('action="norm").wait()', 'action="norm").wait() / len(values)'),
    ),
    mutant(
        "norm of this rank's experts alone",
        "NVIDIA-NeMo/Automodel#3816",
        "norm and clip",
        clip('return owner.transport.all_reduce(values, action="norm").wait()', "return values"),
    ),
    mutant(
        "norm without experts",
        "NVIDIA/Megatron-LM#5916",
        "norm and clip",
        clip("*(_of_all_ranks(owner, powered) if owner is not None else (powered,))", "*(() if owner else (powered,))"),
    ),
    mutant(
        "norm counts dense gradients once a rank",
        "NVIDIA/Megatron-LM#2263",
        "norm and clip",
        clip("if owner is not None else (powered,))", "if owner is not None else (powered, powered))"),
    ),
    mutant(
        "clip skipped",
        "huggingface/trl#5712",
        "norm and clip",
        clip("        nn.utils.clip_grads_with_norm_(group, max_norm, total, foreach)\n", "        pass\n"),
    ),
    mutant(
        "clip leaves experts alone",
        "huggingface/trl#5712",
        "norm and clip",
        clip(
            "    for group in _kinds(given).values():\n        nn.utils.clip",
            "    for group in (group for (owner, _), group in _kinds(given).items() if owner is None):\n"
            "        nn.utils.clip",
        ),
    ),
    mutant(
        "experts that are not marked as such",
        "NVIDIA/Megatron-LM#5916",
        "norm and clip",
        Patch("parallel.ownership", "    _marked[module] = ownership\n", "    pass\n"),
    ),
)

CHECKPOINTS: tuple[Mutant, ...] = (
    mutant(
        "one rank's experts saved",
        "KempnerInstitute/KempnerForge#202",
        "save, reshard, load",
        Patch("parallel.state", "if self.ownership.others and name.startswith(prefix)", "if False"),
    ),
    mutant(
        "optimizer state not loaded",
        "EvolvingLMMs-Lab/OneVision-Encoder#65",
        "save, reshard, load",
        adapter("dcp.load(state,", 'dcp.load({"model": state["model"]},'),
    ),
)

IN_DDP: tuple[Mutant, ...] = (
    mutant(
        "DDP averages different experts",
        "microsoft/Swin-Transformer#223",
        "gradients",
        Patch(
            "parallel.prepare",
            "    ddp.ignore(model, _left_alone(model))\n",
            "",
        ),
        Patch("parallel.entering", "    ddp.check(ownership, experts)\n", "    pass\n"),
    ),
    mutant(
        "a model that was not prepared for DDP",
        "microsoft/Swin-Transformer#223",
        "output",
        adapter("self.module = prepare(MoELayer(", "self.module = nn.Identity().forward(MoELayer("),
        adapter("from torch.nn.parallel", "from torch import nn\nfrom torch.nn.parallel"),
    ),
    *(replace(one, soak=True) for one in SCALES),
)

OURS = (*SCALES, *ROUTER, *ROWS, *RECIPE, *NORM, *CHECKPOINTS)
