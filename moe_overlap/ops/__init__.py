"""Arithmetic on one device: the operators of namespace `moe_overlap`, each with its pure-PyTorch reference.

No process group, no streams. Every operator is also at `torch.ops.moe_overlap.<name>`, has a shape function, a backward
where one makes sense and an autocast rule; `registry.explain()` says which implementation runs and why.
"""

from moe_overlap.ops import registry, workspace
from moe_overlap.ops.activation import activation
from moe_overlap.ops.combine import combine, combine_backward
from moe_overlap.ops.expert_loop import expert_mlp_dgrad, expert_mlp_forward, expert_mlp_wgrad
from moe_overlap.ops.expert_mlp import expert_mlp
from moe_overlap.ops.gate import gate_topk
from moe_overlap.ops.grouped_mm import grouped_mm
from moe_overlap.ops.pack import pack, unpack
from moe_overlap.ops.permute import permute
from moe_overlap.ops.row_map import row_map

# These need the operators. The last one is preferred.
from moe_overlap.ops import expert_mlp_grouped  # noqa: F401  # isort: skip
from moe_overlap.ops import triton_kernels  # isort: skip
from moe_overlap.ops import cuda_kernels  # isort: skip

__all__ = [
    "activation",
    "combine",
    "combine_backward",
    "cuda_kernels",
    "expert_mlp",
    "expert_mlp_dgrad",
    "expert_mlp_forward",
    "expert_mlp_wgrad",
    "gate_topk",
    "grouped_mm",
    "pack",
    "permute",
    "registry",
    "row_map",
    "triton_kernels",
    "unpack",
    "workspace",
]
