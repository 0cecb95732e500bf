"""Process groups of our own beside those of torch.distributed, and what of its groups we accept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from moe_overlap.agreement.cost import Grid
from moe_overlap.config import EXCHANGE_SMS
from moe_overlap.errors import ConfigError
from moe_overlap.transport.named_device import as_device

LOOK_S = 0.05  # between two looks at the peers while connections are made


class Groups:
    """The process groups of one generation.

    `watch` is called every LOOK_S while connections are made, and raises to give up. `store` is taken for as long as
    that may last: questions to it have to wait for the library's own.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        backend: str,
        grid: Grid,
        watch: Callable[[], None],
    ) -> None:
        # Twice our own limit: the library's error, if it comes to that, must come after ours.
        limit = timedelta(seconds=2 * timeout_s)
        self.rank, self.world_size = rank, world_size

        def gloo(name: str, ranks: range) -> Any:
            prefix = dist.PrefixStore(name, store)
            return watched(lambda: dist.ProcessGroupGloo(prefix, ranks.index(rank), len(ranks), limit), watch)

        everyone = range(world_size)
        # By who takes part: all ranks, and where messages go along a grid, its row and its column.
        self.control_of: dict[range, Any] = {everyone: gloo("control", everyone)}
        if grid.rows > 1:
            row, column = grid.row(rank), grid.column(rank)
            self.control_of[row] = gloo(f"row {row.start}", row)
            self.control_of[column] = gloo(f"column {column.start}", column)
        self.payload: Any
        if backend == "gloo":
            self.payload = gloo("payload", everyone)
        else:
            options = nccl_options(limit)
            self.payload = dist.ProcessGroupNCCL(dist.PrefixStore("payload", store), rank, world_size, options)
        self.backend = backend

    def break_off(self) -> None:
        """Close all connections, so that no operation of these groups is pending any longer. Never raises."""
        everyone = range(self.world_size)
        for ranks, group in [*self.control_of.items(), (everyone, self.payload)]:
            if group is self.payload and self.backend != "gloo":
                self.payload.abort()
                continue
            for peer in range(len(ranks)):
                if ranks[peer] == self.rank:
                    continue
                try:
                    group.recv([torch.empty(1, dtype=torch.uint8)], peer, 0).wait(timedelta(milliseconds=1))
                except RuntimeError as error:
                    if "Timed out" in str(error):
                        break  # this closed every connection of the group; else that one was closed before: the next


def nccl_options(limit: timedelta) -> Any:
    """Of a group for rows: its exchanges run on as many multiprocessors as the experts leave to them."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = limit
    most = int(EXCHANGE_SMS.read())
    if most:
        options.config.max_ctas = most
    return options


def watched(make: Callable[[], Any], watch: Callable[[], None]) -> Any:
    """What `make` returns or raises, unless `watch`, called every LOOK_S meanwhile, raises first.

    gloo waits five times its limit for a peer that has told its address and does not connect. After `watch` has raised,
    the thread that waits in there is left to itself.
    """
    made: list[Any] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            made.append(make())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="moe_overlap connecting", daemon=True)
    thread.start()
    while True:
        thread.join(LOOK_S)
        if not thread.is_alive():
            break
        watch()
    if errors:
        raise errors[0]
    return made[0]


def resolve_group(group: Any) -> tuple[Any, list[int]]:
    """(process group, its global ranks in group order). Raises ConfigError for one that cannot be used."""
    if not dist.is_available() or not dist.is_initialized():
        raise ConfigError("group", group, "torch.distributed to be initialised first (init_process_group)")
    if group is not None and hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ConfigError("group", group, "a DeviceMesh of one dimension")
        group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        expected = "None, a DeviceMesh of one dimension, or a ProcessGroup that this rank is a member of"
        raise ConfigError("group", group, expected)
    try:
        ranks = dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):
        raise ConfigError("group", group, "a group that is not destroyed") from None
    if dist.get_rank() not in ranks:
        raise ConfigError("group", ranks, f"a group that has this rank ({dist.get_rank()})")
    return group, ranks


def device_of(group: Any, device: torch.device | str | None) -> torch.device:
    """Where the rows are. Raises ConfigError when the group has no backend for it."""
    backends = dict(pair.split(":") for pair in str(dist.get_backend_config(group)).split(","))
    if device is None:
        device = "cpu" if backends.get("cpu") == "gloo" else "cuda"
    device = as_device(device)
    wanted = {"cpu": "gloo", "cuda": "nccl"}.get(device.type)
    if wanted is None or backends.get(device.type) != wanted:
        raise ConfigError("device", device, f"cpu with gloo or cuda with nccl; the group has {backends}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", device, "a CUDA device of this machine: torch finds none")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
