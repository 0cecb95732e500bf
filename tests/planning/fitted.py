"""The six numbers fitted without one paper each, by `python tests/planning/validation.py --fit`."""

from moe_overlap.planning.machines import Reached

WITHOUT = {
    "Tutel": Reached(matmul=0.375, memory=0.6, wire=0.731, spine=1.0, launch_s=4.91e-05, beside=1.36),
    "EPS-MoE": Reached(matmul=0.5, memory=0.95, wire=0.8, spine=0.757, launch_s=0.0001, beside=1.48),
    "DeepSeek-V3 prefill": Reached(matmul=0.476, memory=0.6, wire=0.882, spine=0.654, launch_s=7.21e-05, beside=1.36),
    "Comet": Reached(matmul=0.5, memory=0.6, wire=0.8, spine=0.757, launch_s=7.9e-05, beside=1.36),
    "ScMoE": Reached(matmul=0.5, memory=0.6, wire=0.8, spine=0.757, launch_s=7.57e-05, beside=1.31),
}
