"""Two ranks on one card over NCCL: is a layer in chunks what it is in one process?

    python benchmarks/gpu_nccl.py [--out FILE] [--limit-s 40]

NCCL refuses two ranks on one GPU, unless it takes them for two machines: each gets an NCCL_HOSTID of its own, so that
rows go through the loopback network. NCCL does not support that, so nothing is timed. Checked is what the process group
does on CUDA: a chunked layer forward and backward, overlap on and off equal bit for bit, both right against the whole
layer on one rank. One row, kind "nccl": "right", what was wrong, or "not run" and why: NCCL refused, or the time
was over. The ranks are in processes of their own, which are ended after --limit-s seconds whatever they do.

Exit status: 0 right or not run, 1 wrong, 2 there is no GPU.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import gpu_process, gpu_timing  # noqa: E402
from moe_overlap import MoELayer  # noqa: E402
from moe_overlap.launch import launch  # noqa: E402
from moe_overlap.transport import LocalTransport, ProcessGroupTransport, Transport  # noqa: E402
from moe_overlap.verify.tolerances import TOLERANCES  # noqa: E402

RANKS, TOKENS, HIDDEN, FFN, EXPERTS, TOP_K = 2, 96, 64, 96, 8, 2
SCHEDULES = ("chunked(4)", "chunked(2,experts)")
FOUND = "nccl: "
REFUSED = re.compile(r"NCCL (error|WARN)|DistBackendError|Duplicate GPU", re.IGNORECASE)
KILLED_S = 5.0
TIMEOUT_S = 15.0


def results(transport: Transport, ranks: Sequence[int], device: str, **options: Any) -> dict[str, torch.Tensor]:
    """Output and gradients of a layer that holds the experts of `ranks`, on the tokens of `ranks`, float32."""
    torch.manual_seed(0)
    whole = MoELayer(HIDDEN, FFN, EXPERTS, TOP_K)
    layer = MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, transport=transport, device=device, **options)
    share = EXPERTS // RANKS
    held = slice(share * ranks[0], share * (ranks[-1] + 1))
    with torch.no_grad():
        for (name, into), value in zip(layer.named_parameters(), whole.parameters(), strict=True):
            into.copy_(value[held] if name.startswith("experts.") else value)
    drawn = [torch.randn(2, TOKENS + 7 * rank, HIDDEN, generator=torch.Generator().manual_seed(rank)) for rank in ranks]
    x, dy = torch.cat(drawn, dim=1).to(device)
    x = x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    found |= {name: p.grad for name, p in layer.named_parameters() if name.startswith("experts.")}
    return {name: value.cpu() for name, value in found.items() if value is not None}


def compare(group: Any, rank: int, device: str) -> list[str]:
    """What is wrong on this rank, over `group`; called by all ranks."""
    whole = results(LocalTransport(), range(RANKS), device)
    tokens, experts = [TOKENS + 7 * one for one in range(RANKS)], EXPERTS // RANKS
    wrong = []
    for schedule in SCHEDULES:
        on, off = (
            results(ProcessGroupTransport(group, timeout_s=TIMEOUT_S, device=device), [rank], device,
                    schedule=schedule, overlap=overlap)
            for overlap in (True, False)
        )  # fmt: skip
        for name, got in on.items():
            sizes = [experts] * RANKS if name.startswith("experts.") else tokens
            want = whole[name].split(sizes)[rank]
            error = (got - want).abs().max().item()
            if not error <= TOLERANCES[torch.float32].limit(want.abs().max().item()):
                wrong.append(f"{schedule} {name} is off by {error:.3g}")
            if not torch.equal(got.view(torch.int32), off[name].view(torch.int32)):
                wrong.append(f"{schedule} {name} differs with overlap off")
    return wrong


def rank_main(world: launch.World, argv: Sequence[str]) -> int:
    """One of the two processes. The first says what all have found."""
    os.environ["NCCL_HOSTID"] = f"machine-{world.rank}"  # read when the first communicator is made
    device = "cuda" if "cuda" in argv else "cpu"
    if device == "cuda":
        torch.cuda.set_device(0)
    wrong = compare(world.group, world.rank, device)
    said = [text for text in world.gather_text("; ".join(wrong)) if text]
    if world.rank == 0:
        print(FOUND + json.dumps({"result": "; ".join(said) or "right"}), flush=True)
    return 0


def ranks(device: str) -> int:
    """The two ranks on `device`, until they are done."""
    for name, value in {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_DEBUG": "WARN"}.items():
        os.environ.setdefault(name, value)
    return launch.spawn(rank_main, [device], RANKS, timeout_s=TIMEOUT_S, program="gpu_nccl", cuda=device == "cuda")


def outcome(command: Sequence[str], limit_s: float) -> str:
    """What the ranks said; else how their process ended: "not run" by NCCL or the limit, "failed" by anything else. It
    and all that it started has ended then."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               errors="replace", start_new_session=True)  # fmt: skip
    status: int | None = None
    try:
        text = process.communicate(timeout=limit_s)[0]
        status = process.returncode
    except subprocess.TimeoutExpired:
        text = ""
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    if status is None:
        try:
            text = process.communicate(timeout=KILLED_S)[0]
        except subprocess.TimeoutExpired:  # something that left the session still holds its output
            process.kill()
    print(text, flush=True)
    for line in text.splitlines():
        if line.startswith(FOUND):
            return str(json.loads(line.removeprefix(FOUND))["result"])
    last = [line.strip() for line in text.splitlines() if line.strip()][-1:] or ["it said nothing"]
    if status is None:
        return f"not run: not over within {limit_s:.0f} s: {last[0][:300]}"
    refused = next((line.strip() for line in text.splitlines() if REFUSED.search(line)), None)
    return f"not run: {refused[:300]}" if refused else f"failed: status {status}: {last[0][:300]}"


def main(argv: Sequence[str] | None = None) -> int:
    found = gpu_timing.options(__doc__.splitlines()[0], argv, limit_s=40.0, ranks_on="")
    if found.ranks_on:  # inside
        return ranks(found.ranks_on)
    if reason := gpu_process.no_gpu():
        print(f"gpu_nccl: not run: {reason}", file=sys.stderr)
        return 2
    rows = gpu_timing.Results(found.out)
    result = "not run: this torch has no NCCL"
    if torch.distributed.is_nccl_available():
        result = outcome([sys.executable, str(Path(__file__)), "--ranks-on=cuda"], min(found.limit_s, found.most_s))
    rows.row(kind="nccl", case=f"{RANKS} ranks on one card", schedules=list(SCHEDULES), result=result)
    return 0 if result == "right" or result.startswith("not run") else 1


if __name__ == "__main__":
    sys.exit(main())
