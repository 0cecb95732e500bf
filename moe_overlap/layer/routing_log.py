"""The routing of many calls of many layers, in memory and as a safetensors file.

A file of one layer has `ids` (int32 [N, K]), `weights` (float32 [N, K]) and, where capacity dropped choices, `chosen`
(int32 [N, K], see `Recorded`), of all calls one after the other. With more layers the last one is in it by these names
and the i-th of the others as `ids.<i>`, `weights.<i>`, `chosen.<i>`: so `moe-overlap bench layer --routing` reads every
file. Metadata: E and K of the last layer, and `layers`, JSON: for each layer its name, E, K and the tokens of its
calls. A file of `moe-overlap train --save-routing` has no `layers`: it is one call of one layer, K of whose columns
count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_overlap.errors import ConfigError
from moe_overlap.measure.files import write_atomically
from moe_overlap.routing.replayed import Recorded

FIELD = "replay.file"
NAMES = ("ids", "weights", "chosen")


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerLog:
    """The forward calls of one layer, in order. name: that of the layer in its model."""

    name: str
    num_experts: int
    calls: tuple[Recorded, ...]

    def __post_init__(self) -> None:
        widths = {call.top_k for call in self.calls}
        if len(widths) > 1:
            raise ConfigError("replay.top_k", sorted(widths), "as many experts per token in all calls of a layer")

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of each call."""
        return tuple(call.tokens for call in self.calls)

    def cut(self, tokens: Sequence[int]) -> LayerLog:
        """The same tokens in other calls, of so many tokens each: a rollout's in the micro-batches of a training step,
        say. Raises ConfigError unless they are all tokens."""
        if sum(tokens) != sum(self.tokens) or any(count < 0 for count in tokens):
            raise ConfigError("tokens", tuple(tokens), f"counts whose sum is {sum(self.tokens)}, the recorded tokens")
        whole = _joined(self.calls)
        ends = torch.tensor(tokens, dtype=torch.int64).cumsum(0).tolist() if tokens else []
        calls = tuple(whole.rows(end - count, end) for count, end in zip(tokens, ends, strict=True))
        return LayerLog(name=self.name, num_experts=self.num_experts, calls=calls)


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutingLog:
    """What a RoutingRecorder has recorded and a RoutingReplay replays, of this rank's tokens."""

    layers: tuple[LayerLog, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors: 8 * T * K for each call of each layer in float32, 12 * T * K with a capacity."""
        return sum(call.bytes for layer in self.layers for call in layer.calls)

    def save(self, path: str | Path) -> None:
        """One safetensors file, whole or not there. Weights as float32. Needs `safetensors` (the extra `cli`)."""
        from safetensors.torch import save

        if not self.layers:
            raise ConfigError("log.layers", 0, "at least one layer")
        tensors: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(self.layers):
            whole = _joined(layer.calls)
            suffix = "" if index + 1 == len(self.layers) else f".{index}"
            parts = (whole.ids_TK, whole.weights_TK.to(torch.float32), whole.chosen_TK)
            for name, part in zip(NAMES, parts, strict=True):
                if part is not None:
                    tensors[name + suffix] = part.cpu().contiguous()
        described = [{"name": one.name, "E": one.num_experts, "K": _width(one.calls), "tokens": one.tokens}
                     for one in self.layers]  # fmt: skip
        last = described[-1]
        metadata = {"E": str(last["E"]), "K": str(last["K"]), "layers": json.dumps(described)}
        write_atomically(Path(path), save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> RoutingLog:
        """The log in a file of `save`, or of `moe-overlap train --save-routing`. Raises ConfigError ("replay.file", or
        the name of what does not fit) for a file that is missing, broken or something else."""
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise ConfigError(FIELD, str(path), "an existing safetensors file")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = dict(file.metadata() or {})
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ConfigError(FIELD, str(path), f"a whole safetensors file ({error})") from None
        described = _described(metadata, tensors, path)
        return cls(layers=tuple(_read_layer(tensors, one, index, len(described), path)
                                for index, one in enumerate(described)))  # fmt: skip


def _width(calls: Sequence[Recorded]) -> int:
    return calls[0].top_k if calls else 0


def _joined(calls: Sequence[Recorded]) -> Recorded:
    """All calls as one."""
    if not calls:
        return Recorded(ids_TK=torch.zeros(0, 0, dtype=torch.int32), weights_TK=torch.zeros(0, 0))
    limited = any(call.chosen_TK is not None for call in calls)
    return Recorded(
        ids_TK=torch.cat([call.ids_TK for call in calls]),
        weights_TK=torch.cat([call.weights_TK for call in calls]),
        chosen_TK=torch.cat([call.wanted_TK for call in calls]) if limited else None,
    )


def _described(metadata: dict[str, str], tensors: dict[str, torch.Tensor], path: str | Path) -> list[dict[str, Any]]:
    """The entries of `layers`, checked."""
    ids = tensors.get("ids")
    try:
        if "layers" not in metadata:
            if ids is None or ids.dim() != 2:
                raise ValueError("no ids [N, K]")
            width = min(int(metadata.get("K", ids.shape[1])), ids.shape[1])
            return [{"name": "", "E": int(metadata["E"]), "K": width, "tokens": [ids.shape[0]]}]
        found = [{"name": str(one["name"]), "E": _whole(one["E"]), "K": _whole(one["K"]),
                  "tokens": _counts(one["tokens"])}
                 for one in json.loads(metadata["layers"])]  # fmt: skip
        if not found:
            raise ValueError("no layer")
        return found
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(FIELD, str(path), f"metadata of a routing file ({error})") from None


def _counts(given: Iterable[Any]) -> list[int]:
    counts = [_whole(count) for count in given]
    if any(count < 0 for count in counts):
        raise ValueError("negative tokens")
    return counts


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no integer")
    return value


def _read_layer(
    tensors: dict[str, torch.Tensor], described: dict[str, Any], index: int, layers: int, path: str | Path
) -> LayerLog:
    suffix = "" if index + 1 == layers else f".{index}"
    ids, weights, chosen = (tensors.get(name + suffix) for name in NAMES)
    width, tokens, experts = described["K"], described["tokens"], described["E"]
    expected = f"ids{suffix} (int32) and weights{suffix} (float32), [{sum(tokens)}, at least {width}]"
    if ids is None or weights is None or ids.dim() != 2 or ids.dtype != torch.int32 or weights.dtype != torch.float32:
        raise ConfigError(FIELD, str(path), expected)
    if ids.shape != weights.shape or ids.shape[0] != sum(tokens) or ids.shape[1] < width:
        raise ConfigError(FIELD, str(path), f"{expected}, not {tuple(ids.shape)} and {tuple(weights.shape)}")
    whole = Recorded(ids_TK=ids[:, :width], weights_TK=weights[:, :width],
                     chosen_TK=None if chosen is None else chosen[:, :width])  # fmt: skip
    if whole.ids_TK.numel() and (int(whole.ids_TK.min()) < -1 or int(whole.wanted_TK.min()) < -1):
        raise ConfigError(FIELD, str(path), "ids of at least -1")
    if not bool(whole.weights_TK.isfinite().all()):
        raise ConfigError(FIELD, str(path), "finite weights")
    one_call = LayerLog(name=described["name"], num_experts=experts, calls=(whole,))
    return one_call.cut(tokens)
