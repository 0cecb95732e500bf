"""The operators as a schedule calls them, many times in a step: the kernel that the registry chooses, and nothing else.

No check of shapes, no gradient, no dispatcher of torch: what a user gives was checked at the layer's edge, buffers and
maps are the step's own, and autograd has nodes for whole stretches of a step. Arguments are those of the operators in
`torch.ops.moe_overlap`, all of them; the pieces of the expert MLP take a call (`expert_mlp_contract.py`). Whoever calls
these has gradients off, and is not traced by torch.compile.
"""

from __future__ import annotations

from moe_overlap.ops import registry

row_map, permute, combine, combine_backward = map(
    registry.kernel, ("row_map", "permute", "combine", "combine_backward")
)
pack, unpack_into = map(registry.kernel, ("pack", "unpack_into"))
expert_mlp_forward, expert_mlp_dgrad, expert_mlp_wgrad = map(
    registry.kernel, ("expert_mlp_forward", "expert_mlp_dgrad", "expert_mlp_wgrad")
)
