"""The fused ops without the layer and without a process group. python examples/ops_only.py"""

import torch

from moe_overlap import ops

T, D, F, E, K = 128, 64, 256, 8, 2
torch.manual_seed(0)
x_TD = torch.randn(T, D, requires_grad=True)
w_in, w_out = torch.randn(E, 2 * F, D) / 8, torch.randn(E, D, F) / 16
weights_TK, ids_TK = torch.randn(T, E).softmax(dim=1).topk(K, dim=1)
maps = ops.row_map(ids_TK.int(), num_experts=E)  # a NamedTuple
rows_RD = ops.permute(x_TD, maps.slot_to_row, num_rows=T * K)
out_RD = ops.expert_mlp(rows_RD, w_in, w_out, maps.offs, kind="swiglu")
y_TD = ops.combine(out_RD, maps.slot_to_row, weights_TK)
y_TD.square().mean().backward()

want_TD = torch.zeros(T, D)
for e in range(E):
    gate, up = (x_TD @ w_in[e].T).chunk(2, dim=1)
    weight_T1 = (weights_TK * (ids_TK == e)).sum(dim=1, keepdim=True)
    want_TD += weight_T1 * ((torch.nn.functional.silu(gate) * up) @ w_out[e].T)
print(f"largest difference from plain PyTorch: {(y_TD - want_TD).abs().max():.1e}")
