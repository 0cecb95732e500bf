"""What `moe-overlap info` prints: versions, what is compiled and why not, chosen implementations, environment."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Sequence

from moe_overlap import config
from moe_overlap.errors import ConfigError
from moe_overlap.native import build_info, native


def main(argv: Sequence[str]) -> int:
    """The command: prints the text, takes no options."""
    from moe_overlap.commands.parser import OneLineParser

    parser = OneLineParser(prog="moe-overlap info", description=__doc__)
    parser.parse_args(argv)
    print("\n".join(lines()))
    return 0


def lines() -> list[str]:
    """The whole text, one fact a line."""
    sections = (_versions(), build_info.lines(), _loaded(), _implementations(), _environment(), _warnings())
    return [line for section in sections for line in section]


def _versions() -> list[str]:
    import torch

    text = [f"moe-overlap {build_info.VERSION} in {native.PACKAGE_DIR.parent}"]
    text.append(f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}")
    if torch.version.cuda is None:
        return [*text, "cuda: this torch has no CUDA"]
    if not torch.cuda.is_available():
        return [*text, f"cuda: torch is for CUDA {torch.version.cuda}, no device found"]
    names = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return [*text, f"cuda: torch is for CUDA {torch.version.cuda}, devices: {names}"]


def _loaded() -> list[str]:
    text = ["compiled parts:"]
    for part in native.parts():
        text.append(f"  {part.name}: {'loaded' if part.loaded else 'not loaded'}: {part.reason}")
        if part.path:
            text.append(f"    {part.path}")
    return text


def _implementations() -> list[str]:
    """Importing the operators registers them; without an import an operator has nothing to explain."""
    import torch

    from moe_overlap.schedule import simulate

    name, reason = simulate.implementation()
    text = ["implementations:", f"  simulator: {name} ({reason})"]
    importlib.import_module("moe_overlap.ops")
    registry = importlib.import_module("moe_overlap.ops.registry")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        text += [f"  {device}: {line}" for line in registry.explain(device)]
    return text


def _environment() -> list[str]:
    text = ["environment:"]
    for variable in config.VARIABLES:
        try:
            value = f"{variable.read():g}"
        except ConfigError as error:
            value = f"BAD: {error}"
        given = "set" if variable.is_set else "default"
        text.append(f"  {variable.name} = {value} ({given}): {variable.meaning}")
    return text


def _warnings() -> list[str]:
    """With one hardware queue kernels run in the order they were enqueued, so an exchange cannot pass a GEMM."""
    if not config.one_hardware_queue():
        return []
    return [
        f"WARNING: {config.CONNECTIONS}=1 puts all CUDA streams on one hardware queue: exchanges then run in issue "
        "order with compute and overlap suffers. Unset it unless another library needs it."
    ]
