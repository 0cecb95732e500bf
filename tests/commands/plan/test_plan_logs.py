"""Figures of wires from what nccl-tests, DeepEP and torch.profiler write."""

import json

import pytest

from moe_overlap.commands.plan.logs import measured_figures
from moe_overlap.commands.plan.options import parse
from moe_overlap.errors import ConfigError

# alltoall_perf of nccl-tests 2.13: 8 us, and 50 GB/s of what leaves a rank (7/8 of the size).
LINE = (
    "{size:12d} {count:12d}     float    none      -1 {us:8.2f}   10.00    8.75      0 {us:8.2f}   10.00    8.75    N/A"
)
HEAD = """# nThread 1 nGpus 1 minBytes 1048576 maxBytes 67108864 step: 2(factor) warmup iters: 5 iters: 20
#
# Using devices
{ranks}
#
#       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)            (us)  (GB/s)  (GB/s)
"""


def nccl_tests(hosts, leave):
    ranks = "\n".join(f"#  Rank {i:2d} Group  0 Pid {100 + i} on {host:>10s} device  {i} [0x07] NVIDIA H100"
                      for i, host in enumerate(hosts))  # fmt: skip
    sizes = [2**power for power in (20, 22, 24, 26)]
    lines = [LINE.format(size=n, count=n // 4, us=8 + leave * n / 50e9 * 1e6) for n in sizes]
    return HEAD.format(ranks=ranks) + "\n".join(lines) + "\n# Avg bus bandwidth    : 8.75\n"


DEEPEP = """[config] num_tokens=4096, hidden=7168, num_topk=8
[tuning] SMs 24, NVL chunk 4, RDMA chunk 4:  50.10 GB/s (RDMA), 163.05 GB/s (NVL)
[tuning] Best dispatch (FP8): SMs 24, NVL chunk 24, RDMA chunk 16: 3000 us, 58.21 GB/s (RDMA), 190.01 GB/s (NVL)
[tuning] Best dispatch (BF16): SMs 24, NVL chunk 32, RDMA chunk 16: 57.00 GB/s (RDMA), 187.00 GB/s (NVL)
[tuning] Best combine: SMs 24, NVL chunk 4, RDMA chunk 12: 55.50 GB/s (RDMA), 181.30 GB/s (NVL)
"""


def kineto(group, **changes):
    events = [{"cat": "cpu_op", "name": "aten::mm", "dur": 3}]
    for count in (1 << 20, 1 << 22):
        leave = (group - 8) / group if group > 8 else (group - 1) / group
        args = {"Collective name": "all_to_allv", "In msg nelems": count, "dtype": "BFloat16", "Group size": group}
        events.append({"cat": "kernel", "name": "ncclDevKernel_SendRecv", "dur": 20 + leave * 2 * count / 25e9 * 1e6,
                       "args": args | changes})  # fmt: skip
    return json.dumps({"schemaVersion": 1, "traceEvents": events})


def read(tmp_path, text, **more):
    path = tmp_path / "log"
    path.write_text(text)
    return measured_figures(str(path), ranks_per_node=8, **more)


def test_nccl_tests_of_one_node_and_of_two(tmp_path):
    found = read(tmp_path, nccl_tests(["a"] * 8, 7 / 8))
    assert found == {"latency": pytest.approx(8e-6, rel=0.05), "intra_bandwidth": pytest.approx(50e9, rel=0.01),
                     "message": 0.0}  # fmt: skip
    two = read(tmp_path, nccl_tests(["a"] * 8 + ["b"] * 8, 8 / 16))
    assert two["bandwidth"] == pytest.approx(50e9, rel=0.01) and "intra_bandwidth" not in two


def test_deepep_gives_both_wires_the_slower_direction(tmp_path):
    assert read(tmp_path, DEEPEP) == {"bandwidth": 55.5e9, "intra_bandwidth": 181.3e9}


@pytest.mark.parametrize(("group", "wire"), [(8, "intra_bandwidth"), (32, "bandwidth")])
def test_a_trace_gives_the_wire_of_its_group(group, wire, tmp_path):
    found = read(tmp_path, kineto(group))
    assert found[wire] == pytest.approx(25e9) and found["latency"] == pytest.approx(20e-6, rel=1e-3)


def test_figures_given_win(tmp_path):
    path = tmp_path / "deepep.txt"
    path.write_text(DEEPEP)
    options = parse(["--machine", "h100x8", "--measured", str(path), "--bandwidth", "10GB"])
    assert (options.bandwidth, options.intra_bandwidth) == (10e9, 181.3e9)


@pytest.mark.parametrize(
    "text",
    [
        "", "hello", "{", "[]", '{"traceEvents": []}', '{"traceEvents": [1, null, {"cat": "kernel", "args": 3}]}',
        kineto(8, dtype="Nothing"), kineto(8, **{"In msg nelems": 5}), nccl_tests([], 1), nccl_tests(["a"] * 8, 0),
        "[tuning] Best dispatch (FP8): nothing",
    ],
)  # fmt: skip
def test_what_says_nothing_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match="--measured"):
        read(tmp_path, text)
