"""A tiny Qwen3-MoE of transformers (5.2x) under its own expert parallelism, the MoE block and what surrounds it.

Needs the packages transformers and accelerate. `group` has to be all ranks, since its meshes are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from transformers import Qwen3MoeConfig, Qwen3MoeModel, Trainer
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from moe_overlap.errors import ConfigError
from moe_overlap.verify.adapter import Adapter, State


class Qwen3MoE(Adapter):
    """One decoder layer; every rank has a sequence of its own. FSDP2 shards what is not experts, and averages."""

    may_be_empty = False
    coarsest = torch.float32  # its router and its norms compute in float32 whatever the input

    def build(self, group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        disable_progress_bar()
        set_verbosity_error()
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the others refuse float64
        config = Qwen3MoeConfig(
            hidden_size=self.hidden, moe_intermediate_size=24, num_experts=self.experts, num_experts_per_tok=self.top_k,
            num_hidden_layers=1, num_attention_heads=6, num_key_value_heads=6, head_dim=4, vocab_size=12,
            norm_topk_prob=True, **eager,
        )  # fmt: skip
        model: Any = Qwen3MoeModel(config).to(dtype)
        if group is not None:
            if group.size() != dist.get_world_size():
                raise ConfigError("group", group.size(), "all ranks of torch.distributed: the meshes are of all ranks")
            with tempfile.TemporaryDirectory(prefix="moe_overlap-verify-") as folder:
                config.save_pretrained(folder)  # on every rank, where model.save_pretrained writes on the first alone
                save_file(model.state_dict(), Path(folder) / "model.safetensors", metadata={"format": "pt"})
                model = Qwen3MoeModel.from_pretrained(
                    folder, dtype=dtype, distributed_config=self.parallelism(group.size()), **eager
                )
        self.module = model.train()

    def parallelism(self, ranks: int) -> Any:
        """Experts spread over the ranks, all else sharded over the same ranks."""
        return DistributedConfig(fsdp_size=ranks, ep_size=ranks)

    def kind_of(self, name: str) -> str:
        if "embed_tokens" in name:
            return "buffer"  # the kit gives hidden states: nothing trains it
        kinds = {"mlp.experts": "experts", "mlp.gate.": "router"}
        return next((kind for word, kind in kinds.items() if word in name), "other")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.module(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
        return y

    def routing_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen: list[Any] = []
        gate = self.module.get_submodule("layers.0.mlp.gate")
        hook = gate.register_forward_hook(lambda module, args, output: seen.append(output))
        self.forward(x)
        hook.remove()
        _, weights, ids = seen[0]
        return ids, weights

    def load_full(self, state: State) -> None:
        set_model_state_dict(self.module, dict(state), options=StateDictOptions(full_state_dict=True))

    def full_state(self) -> State:
        return {name: _full(tensor.detach()).clone() for name, tensor in self.module.state_dict().items()}

    def sync_grads(self) -> None:
        """FSDP2 has done it."""

    def full_grads(self) -> State:
        return {name: _full(p.grad).clone() for name, p in self.module.named_parameters() if p.grad is not None}

    def clip(self, max_norm: float) -> torch.Tensor:
        """What the Trainer does where gradients lie on several meshes."""
        norm: torch.Tensor = Trainer._mixed_mesh_grad_norm(None, self.module, max_norm)
        return norm

    def optimizer_step(self) -> None:
        if not hasattr(self, "optimizer"):
            self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-2, foreach=False)
        self.optimizer.step()

    def checkpointed(self, x: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            return self.forward(x)
        finally:
            module.gradient_checkpointing_disable()


class Qwen3MoESharedBatch(Qwen3MoE):
    """Tensor parallelism around the experts: all ranks have the same sequence."""

    same_tokens = True

    def parallelism(self, ranks: int) -> Any:
        return DistributedConfig(tp_size=ranks, ep_size=ranks)


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, collective; other tensors are whole."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
