"""Another placement for the layers of a model while it trains: copies alone, or homes with all that is theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import nn
from torch.optim import Optimizer

from moe_overlap.agreement.copies import trust
from moe_overlap.agreement.record import digest
from moe_overlap.agreement.seats import seats_of
from moe_overlap.errors import ConfigError
from moe_overlap.layer.layer import MoELayer
from moe_overlap.layer.static import is_static
from moe_overlap.parallel.migration import migrated
from moe_overlap.parallel.optimizer_state import attended
from moe_overlap.placement.placement import Placement

Placements = Placement | Sequence[Placement]


def set_placement(model: nn.Module, placement: Placements) -> None:
    """Other copies for the MoE layers of `model`, between two steps: homes stay where they are, and so nothing is sent.
    Copies that a rank has and keeps stay valid; new ones are fetched (Wf) in the next forward call.

    placement: of all layers, or one for each in the order of the model. Its epoch becomes the next one of the layer.
    On all ranks alike: else the next call raises PlanMismatch, and where replicas differ the next `migrate`, as
    copies that another replica has or has not change no number. Raises ConfigError for a placement that does not fit,
    that moves a home (see `migrate`), and while a forward call of a layer still waits for its backward; no layer is
    changed then.
    """
    pairs = _pairs(model, placement)
    for layer, new in pairs:
        _check(layer, new)
        if seats_of(new).homes != layer.dispatcher.seats.homes:
            raise ConfigError("placement", seats_of(new).homes, f"{layer.dispatcher.seats.homes}, the homes that the "
                              "experts have; migrate(model, placement, optimizers) moves them")  # fmt: skip
    for layer, new in pairs:
        layer.dispatcher.placement = new


def migrate(model: nn.Module, placement: Placements, optimizers: Optimizer | Sequence[Optimizer] = ()) -> int:
    """Move experts of the MoE layers of `model` to the homes of `placement`, between two steps: parameters, and what
    the `optimizers` keep of them; copies are as after `set_placement`. Returns the bytes that this rank sent.

    Where a rank gets another number of experts its parameters become other ones, in the experts and in the optimizers;
    else they stay the same objects. Gradients have to be None. Layers are migrated one after the other, each by all its
    ranks together, and each is either in the old placement or in the new one: where a rank fails, the layer under way
    and those behind it stay as they are.

    Collective, over the replicas of the experts too (`replicate_group`): all of them move to one placement, each group
    of ranks its own experts. Raises ConfigError as `set_placement` does, on all ranks where one refuses, and for an
    optimizer that keeps states of these experts and is not given; PlanMismatch where ranks mean different moves;
    MoeTransportError, after which `reopen(model)` is for all ranks.
    """
    given = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    pairs, homes, moved, sent = _pairs(model, placement), dict[nn.Module, object](), set[nn.Module](), 0
    for layer, new in pairs:
        if homes.setdefault(layer.experts, seats_of(new).homes) != seats_of(new).homes:
            raise ConfigError("placement", new, "the same homes for layers that share their experts")
    for layer, new in pairs:
        if layer.experts not in moved:
            sent += _move(layer, new, given)
        moved.add(layer.experts)
        layer.dispatcher.placement = new
        layer.dispatcher.copy_store.forget()
        trust(layer.experts.parameters())
    return sent


@contextmanager
def experts_in_order(model: nn.Module, optimizers: Optimizer | Sequence[Optimizer] = ()) -> Iterator[None]:
    """For as long as it lasts expert i is at home where `Placement.identity` has it, as checkpoints of
    torch.distributed.checkpoint want it: save or load the model and its optimizers in here, whatever the placement and
    the number of ranks. Then everything goes back (`migrate`, both ways), also where the body raised on all ranks.

    Collective. Raises as `migrate` does.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    before = [layer.dispatcher.placement for layer in layers]
    migrate(model, [Placement.identity(one.num_experts, one.world_size) for one in before], optimizers)
    try:
        yield
    finally:
        migrate(model, before, optimizers)


def _move(layer: MoELayer, new: Placement, optimizers: list[Optimizer]) -> int:
    """The experts of one layer; the bytes that this rank sent."""
    d, error = layer.dispatcher, None
    try:
        _check(layer, new)
        known = [one for one in attended(layer.experts) if all(one is not other for other in optimizers)]
        if known:
            given = f"without {', '.join(type(one).__name__ for one in known)}, which keeps states of experts"
            raise ConfigError("optimizers", given, "all optimizers of these experts")
    except ConfigError as refused:
        error = refused
    d.open()
    before = layer.transport.stats.weight_bytes
    tag = digest(d.placement.digest, new.digest)
    migrated(layer.experts, layer.ownership, d.seats, seats_of(new), optimizers, tag, error)()
    return layer.transport.stats.weight_bytes - before


def _pairs(model: nn.Module, placement: Placements) -> list[tuple[MoELayer, Placement]]:
    """The layers, and what each is to have, with the next epoch of the layer."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    if not layers:
        raise ConfigError("model", type(model).__name__, "a MoELayer, or a module with some in it")
    given = [placement] * len(layers) if isinstance(placement, Placement) else placement
    if not isinstance(given, Sequence) or len(given) != len(layers):
        raise ConfigError("placement", placement, f"a Placement, or one for each of {len(layers)} layers")
    for one in given:
        if not isinstance(one, Placement):
            raise ConfigError("placement", type(one).__name__, "a moe_overlap.placement.Placement")
    epochs = [layer.dispatcher.placement.epoch + 1 for layer in layers]
    return [(layer, replace(one, epoch=epoch)) for layer, one, epoch in zip(layers, given, epochs, strict=True)]


def _check(layer: MoELayer, new: Placement) -> None:
    old = layer.dispatcher.placement
    if (new.num_experts, new.world_size) != (old.num_experts, old.world_size):
        given = f"{new.num_experts} experts on {new.world_size} rank(s)"
        raise ConfigError("placement", given, f"{old.num_experts} experts on {old.world_size} rank(s)")
    if old.world_size == 1 and new.has_replicas:
        raise ConfigError("placement", "several slots of an expert on one rank", "one of each")
    if layer.dispatcher.hierarchical and seats_of(new).has_copies:
        raise ConfigError("placement", "copies of experts", "none beside hierarchical exchanges")
    if is_static(layer.dispatcher):
        raise ConfigError("mode", "static", "'host': fixed shapes have one placement")
    wide, was = seats_of(new).width, layer.dispatcher.seats.width
    if layer.dispatcher.dedup == 1 and wide != was:
        expected = f"{was}, as before: tables of deduplicated rows have a size"
        raise ConfigError("placement", f"{wide} slots on the busiest rank", expected)
    if layer._outgrown.waiting:
        expected = "none: a recompute in it needs the placement of its forward (eval belongs in no_grad())"
        raise ConfigError("placement", "a forward call that still waits for its backward", expected)
