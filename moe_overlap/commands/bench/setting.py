"""What all phases of a benchmark share on one rank: models, wires, inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moe_overlap.commands.bench.cases import BlockPair
from moe_overlap.commands.bench.check import reference
from moe_overlap.commands.bench.options import LayerOptions
from moe_overlap.commands.bench.routing import read_file, routing_file
from moe_overlap.commands.bench.slept import Calibration, calibrate
from moe_overlap.commands.bench.wires import Wires
from moe_overlap.launch.launch import World
from moe_overlap.measure.machine import commit, cores_here, hardware, ranks_here

SEED = 1234


@dataclass(kw_only=True)
class Setting:
    """`models` and `wires` by case. top2 is always there: it is what everything is compared with."""

    options: LayerOptions
    world: World
    say: Callable[[str], None]
    models: dict[str, BlockPair]
    wires: dict[str, Wires]
    x_TD: torch.Tensor
    dy_TD: torch.Tensor
    routing: tuple[torch.Tensor, torch.Tensor]
    constant: dict[str, Any]
    oversubscribed: bool
    sleep: Calibration | None = None
    _right: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        options: LayerOptions,
        world: World,
        routing: tuple[torch.Tensor, torch.Tensor],
        say: Callable[[str], None],
    ) -> Setting:
        """Collective over the world: transports are made in the same order on all ranks."""
        say(f"{world.size} rank(s): making {', '.join(options.cases)}")
        ids_TK, weights_TK = routing
        models: dict[str, BlockPair] = {}
        wires: dict[str, Wires] = {}
        for case in dict.fromkeys(("top2", *options.cases)):
            wires[case] = Wires.open(world, options.timeout_s, options.device)
            models[case] = BlockPair(
                case, options.sizes, ids_TK, weights_TK, wires[case].core, dtype=options.torch_dtype,
                dedup=options.dedup, ranks_per_node=options.ranks_per_node,
            )  # fmt: skip
        generator = torch.Generator().manual_seed(SEED + world.rank)
        shape = (options.tokens, options.hidden)
        x_TD, dy_TD = (torch.randn(shape, generator=generator).to(options.torch_dtype) for _ in range(2))
        over = ranks_here(world.size) * options.threads > cores_here() and options.compute == "real"
        return cls(
            options=options,
            world=world,
            say=say,
            models=models,
            wires=wires,
            x_TD=x_TD,
            dy_TD=dy_TD,
            routing=routing,
            constant=constants(options),
            oversubscribed=over,
            sleep=calibrate(world, options) if options.compute == "slept" else None,
        )

    def right(self, case: str) -> torch.Tensor:
        """The case's output in float64, computed once. Collective."""
        if case not in self._right:
            double = reference(self.world, self.models[case], *self.routing)
            with torch.no_grad():
                self._right[case] = double(self.x_TD.double())
        return self._right[case]


def constants(options: LayerOptions) -> dict[str, Any]:
    """The keys of a row that are the same in a whole run, except phase and link."""
    routing = options.routing
    path = routing_file(routing, options.out)
    file = None if path is None else read_file(path, experts=options.experts, top_k=options.top_k)
    names = "ranks ranks_per_node threads tokens hidden ffn experts top_k dtype dedup repeats compute".split()
    return {
        **{name: getattr(options, name) for name in names},
        "routing": Path(routing).name if os.sep in routing else routing,
        "router": None if file is None else file.router,
        "mu": None if file is None else file.mu,
        "hardware": hardware(),
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
