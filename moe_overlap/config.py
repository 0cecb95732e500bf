"""Every environment variable this library looks at, at run time: nothing else in the package touches `os.environ`.

Build-time variables (`MOE_OVERLAP_BUILD`, `TORCH_CUDA_ARCH_LIST`, `MAX_JOBS`) belong to `setup.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_overlap.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class _Variable:
    name: str
    meaning: str

    @property
    def is_set(self) -> bool:
        """Whether the environment has a value for it."""
        return bool(os.environ.get(self.name))


@dataclass(frozen=True, kw_only=True)
class EnvVariable(_Variable):
    """One variable: its name, what it means, its default and the closed range its value must lie in; `whole`: as an
    integer."""

    default: float
    low: float
    high: float
    whole: bool = False

    def read(self) -> float:
        """The value in force. Raises ConfigError for text that is no such number or lies outside the range."""
        text = os.environ.get(self.name)
        if text is None or text == "":
            return self.default
        expected = f"{'an integer' if self.whole else 'a number'} from {self.low:g} to {self.high:g} ({self.meaning})"
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(self.name, text[:80], expected) from None
        outside = math.isnan(value) or not self.low <= value <= self.high
        if not text.isascii() or outside or (self.whole and not value.is_integer()):
            raise ConfigError(self.name, text[:80], expected)
        return value


@dataclass(frozen=True, kw_only=True)
class EnvChoice(_Variable):
    """A variable whose value is one of a few words: its name, what it means, its default and all the words."""

    default: str
    words: tuple[str, ...]

    def read(self) -> str:
        """The value in force. Raises ConfigError for any other text."""
        text = os.environ.get(self.name) or self.default
        if text not in self.words:
            raise ConfigError(self.name, text[:80], f"{' or '.join(self.words)} ({self.meaning})")
        return text


TIMEOUT_S = EnvVariable(
    name="MOE_OVERLAP_TIMEOUT_S",
    meaning="seconds that a wait for a peer may take",
    default=60.0,
    low=0.05,
    high=3600.0,
)
SLOW_PEER_S = EnvVariable(
    name="MOE_OVERLAP_SLOW_PEER_S",
    meaning="seconds of waiting after which a warning names the peer",
    default=20.0,
    low=0.05,
    high=3600.0,
)
EXCHANGE_SMS = EnvVariable(
    name="MOE_OVERLAP_EXCHANGE_SMS",
    meaning="multiprocessors of a GPU for exchanges of several ranks, which experts leave to them (0: no limit)",
    default=16.0,
    low=0.0,
    high=1024.0,
    whole=True,
)
TILES = EnvChoice(
    name="MOE_OVERLAP_TILES",
    meaning="how programs of the expert MLP's Triton kernels get their tiles: each its own ones, or the next one left",
    default="in_turn",
    words=("in_turn", "dealt"),
)
VARIABLES = (TIMEOUT_S, SLOW_PEER_S, EXCHANGE_SMS, TILES)
TRITON_INTERPRET = "TRITON_INTERPRET"
CACHE_DIR = "MOE_OVERLAP_CACHE_DIR"
CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
PREFIX = "MOE_OVERLAP_"
READ_ELSEWHERE = (CACHE_DIR, "MOE_OVERLAP_BUILD", "MOE_OVERLAP_COMMIT")  # by `cache_dir`, setup.py, make gpu


def check_environment() -> None:
    """Raises ConfigError for a variable with a value that it cannot have. Transports and commands ask this before all
    else: so all ranks find out at once, and not one of them within a step, where a variable is first read."""
    for variable in VARIABLES:
        variable.read()


def unknown_variables() -> list[str]:
    """Names in the environment that look like ours and that nothing reads, such as a misspelt one."""
    known = {variable.name for variable in VARIABLES} | set(READ_ELSEWHERE)
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def cache_dir() -> Path:
    """Where calibrations are kept: MOE_OVERLAP_CACHE_DIR, else moe_overlap in the user's cache directory."""
    text = os.environ.get(CACHE_DIR, "")
    if text:
        return Path(text)
    base = os.environ.get("XDG_CACHE_HOME", "")  # the desktop standard for caches
    try:
        return (Path(base) if base else Path.home() / ".cache") / "moe_overlap"
    except RuntimeError:  # a user without a home, as in many containers
        return Path(os.devnull) / "moe_overlap"  # where nothing can be kept


def triton_interpreter() -> bool:
    """Whether Triton runs kernels in its interpreter: its own variable TRITON_INTERPRET, as Triton reads it."""
    return os.environ.get(TRITON_INTERPRET, "").lower() in ("1", "true", "yes", "on", "y")


def one_hardware_queue() -> bool:
    """Whether CUDA_DEVICE_MAX_CONNECTIONS puts all streams on one queue."""
    return os.environ.get(CONNECTIONS) == "1"


def torchrun(name: Literal["RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]) -> int | None:
    """One of the numbers that torchrun gives to the processes it starts, which are part of its contract; else None."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else None


def environment_with(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment of this process with changes, for one that it starts."""
    return os.environ | changes


def listen_on_loopback() -> None:
    """All ranks are on this machine: gloo is to listen on the loopback interface, unless the user named another."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
