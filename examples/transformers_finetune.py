"""Fine-tuning a MoE of transformers whose experts run here. python examples/transformers_finetune.py [MODEL]

MODEL: a folder or a name on the hub. Without one, a tiny Qwen3-MoE with random weights.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moe_overlap.integrations import transformers as moe

torch.manual_seed(0)
moe.register()
if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="moe_overlap")
else:
    config = Qwen3MoeConfig(vocab_size=256, hidden_size=64, intermediate_size=96, moe_intermediate_size=48,
                            num_experts=8, num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=16, pad_token_id=0)  # fmt: skip
    model = moe.use(AutoModelForCausalLM.from_config(config))
print(f"{len(moe.check(model))} layers have their experts here")
text = b"Rows travel to their experts and back, and compute waits. " * 8
ids = torch.tensor(list(text))[None, :384]
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for _ in range(8):
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
