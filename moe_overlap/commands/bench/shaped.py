"""Two nodes on one Linux machine with a real TCP link between them: network namespaces, a pair of virtual Ethernet
devices, and the kernel's token bucket (tc tbf) for its rate. Needs root, and the programs ip and tc.

A node's device sends at the rate of one rank's link times the ranks of the node, which is a link for each rank as long
as they all send alike. The latency of a link is the kernel's own, some 50 us here, and no figure of the link's text
changes it. The bucket is small, so that an exchange of some hundred kB does not get through for free, and frames are
large, so that headers are under 1 % of the bytes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from moe_overlap import config
from moe_overlap.transport.link import LinkSpec

DEVICE = "moe0"  # of each node: devices of two namespaces may have one name
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 29500  # in namespaces that are this run's alone
MTU = 9000
BUCKET = "32kb"
QUEUE = "10s"  # of waiting bytes: nothing is dropped
NODES = 2
GRACE_S = 5.0
POLL_S = 0.05
ASK_S = 30.0  # for ip and tc
TEXT_LIMIT = 200


def unavailable() -> str | None:
    """Why this machine cannot have such a link; None where it can. Tries to make one, and leaves nothing behind."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "needs root"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"needs the program {missing[0]} (package iproute2)"
    try:
        with nodes() as (first, _):
            shape(DEVICE, LinkSpec(bytes_per_s=1e6), 1, namespace=first)
            _run("ip", "netns", "exec", first, "true")
    except OSError as error:
        return f"needs root with network namespaces ({error})"
    return None


@contextmanager
def nodes() -> Iterator[tuple[str, str]]:
    """The names of two joined namespaces, which are gone afterwards, with all that is in them. OSError where the kernel
    does not make them."""
    token = secrets.token_hex(4)
    names = f"moe-{token}-0", f"moe-{token}-1"
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", DEVICE, "netns", names[0], "type", "veth", "peer", "name", DEVICE, "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", DEVICE, "mtu", str(MTU), "up")
        yield names
    finally:
        for name in names:
            for pid in _ask("ip", "netns", "pids", name).stdout.split():  # a rank whose torchrun was killed
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ask("ip", "netns", "del", name)


def shape(device: str, link: LinkSpec | None, ranks_per_node: int, *, namespace: str | None = None) -> None:
    """Give a device the rate of `link` for each of its ranks; None: all that it can. Of this process's namespace, or of
    another. OSError where the kernel refuses."""
    where = [] if namespace is None else ["-n", namespace]
    if link is None:
        _ask("tc", *where, "qdisc", "del", "dev", device, "root")
        return
    rate = round(link.bytes_per_s * 8 * ranks_per_node)
    _run("tc", *where, "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{rate}bit", "burst", BUCKET,
         "latency", QUEUE)  # fmt: skip


def torchrun(words: Sequence[str], *, ranks_per_node: int, threads: int) -> int:
    """Run `python -m moe_overlap WORDS` by torchrun on both nodes, `ranks_per_node` ranks on each; the first exit
    status that is not zero. No process of it outlives this call."""
    environment = config.environment_with({"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": str(threads)})
    with nodes() as names:
        children: list[subprocess.Popen[bytes]] = []
        try:
            for node, name in enumerate(names):
                command = [
                    "ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run",
                    "--nnodes", str(NODES), "--node-rank", str(node), "--nproc-per-node", str(ranks_per_node),
                    "--master-addr", ADDRESSES[0], "--master-port", str(PORT), "-m", "moe_overlap", *words,
                ]  # fmt: skip
                children.append(subprocess.Popen(command, env=environment, start_new_session=True))
            return _watch(children)
        finally:
            _end(children)


def _watch(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all, or for the first failure, which the others are not waited for. Without a limit of its own: torchrun
    has one for its nodes to meet, and every wait of a rank has one."""
    while True:
        status = [child.poll() for child in children]
        failed = [one for one in status if one]
        if failed:
            return failed[0]
        if None not in status:
            return 0
        time.sleep(POLL_S)


def _end(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what is left of the sessions of `children`, each torchrun with its ranks."""
    for number, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        alive = [child for child in children if child.poll() is None]
        for child in alive:
            os.killpg(child.pid, number)
        for child in alive:
            try:
                child.wait(wait_s)
            except subprocess.TimeoutExpired:
                continue


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    """What a program of the kernel's answers, whatever it is. OSError where it does not."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=ASK_S)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]}: no answer within {ASK_S:g} s") from error


def _run(*command: str) -> None:
    """OSError with what the program said, on one line."""
    done = _ask(*command)
    if done.returncode:
        text = " ".join((done.stderr or done.stdout).split())[:TEXT_LIMIT]
        raise OSError(f"{command[0]}: {text}")
