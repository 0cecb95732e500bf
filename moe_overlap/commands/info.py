"""What `moe-overlap info` prints: whether this install is whole, versions, what is compiled, what computes, the cache
of cost models, and the environment."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Sequence

from moe_overlap import config
from moe_overlap.errors import ConfigError
from moe_overlap.native import build_info, native


def main(argv: Sequence[str]) -> int:
    """The command: prints the text."""
    from moe_overlap.commands.parser import OneLineParser

    parser = OneLineParser(prog="moe-overlap info", description=__doc__)
    parser.add_argument("--verbose", action="store_true", help="with the reason for every op's implementation, what "
                        "each variable of the environment means, and the path of every compiled part")  # fmt: skip
    print("\n".join(lines(verbose=parser.parse_args(argv).verbose)))
    return 0


def lines(*, verbose: bool = False) -> list[str]:
    """The whole text, the answer first, then one fact a line."""
    sections = (
        _answer(),
        _warnings(),
        _versions(),
        build_info.lines(),
        _loaded(verbose=verbose),
        _implementations(verbose=verbose),
        _cache(),
        _environment(verbose=verbose),
    )
    return [line for section in sections for line in section]


def _answer() -> list[str]:
    """What one asks first: does it work here, and on what?"""
    import torch

    parts = native.parts()
    missing = [part.name for part in parts if not part.loaded]
    compiled = "every compiled part is loaded" if not missing else f"not loaded: {', '.join(missing)}; Python does the "
    compiled += "" if not missing else "same, more slowly"
    device = "CPU and CUDA" if torch.cuda.is_available() else "CPU"
    return [f"moe-overlap works here on {device}; {compiled}."]


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


def _loaded(*, verbose: bool) -> list[str]:
    text = ["compiled parts:"]
    for part in native.parts():
        text.append(f"  {part.name}: {'loaded' if part.loaded else 'not loaded'}: {part.reason}")
        if part.path and verbose:
            text.append(f"    {part.path}")
    return text


def _implementations(*, verbose: bool) -> list[str]:
    """Importing the operators registers them; without an import an operator has nothing to explain."""
    import torch

    from moe_overlap.schedule import simulate

    name, reason = simulate.implementation()
    text = ["implementations:", f"  simulator: {name} ({reason})"]
    importlib.import_module("moe_overlap.ops")
    registry = importlib.import_module("moe_overlap.ops.registry")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        if verbose:
            text += [f"  {device}: {line}" for line in registry.explain(device)]
        else:
            text += [f"  {line}" for line in registry.grouped(device)]
    return text if verbose else [*text, "  (why: moe-overlap info --verbose)"]


def _cache() -> list[str]:
    """The cost models that schedule="auto" keeps."""
    from moe_overlap.auto.cost_cache import kept

    files = kept()
    size = sum(path.stat().st_size for path in files)
    folder = config.cache_dir()
    return [f"cost models in {folder}: {len(files)}, {size / 1e3:.3g} kB (moe-overlap calibrate --clear removes them)"]


def _environment(*, verbose: bool) -> list[str]:
    text = ["environment:"]
    for variable in config.VARIABLES:
        try:
            read = variable.read()
            value = read if isinstance(read, str) else f"{read:g}"
        except ConfigError as error:
            text.append(f"  {error}")
            continue
        given = "set" if variable.is_set else "default"
        meaning = f": {variable.meaning}" if verbose or variable.is_set else ""
        text.append(f"  {variable.name} = {value} ({given}){meaning}")
    return text


def _warnings() -> list[str]:
    """What in the environment is wrong. With one hardware queue kernels run in the order they were enqueued, so an
    exchange cannot pass a GEMM."""
    text = []
    for variable in config.VARIABLES:
        try:
            variable.read()
        except ConfigError as error:
            text.append(f"WARNING: {error}: layers and all commands but this one refuse it")
    for name in config.unknown_variables():
        text.append(f"WARNING: nothing reads {name}: is it misspelt? (those that are read: see below)")
    if config.one_hardware_queue():
        text.append(
            f"WARNING: {config.CONNECTIONS}=1 puts all CUDA streams on one hardware queue: exchanges then run in issue "
            "order with compute and overlap suffers. Unset it unless another library needs it."
        )
    return text
