"""Variables of the environment: a bad value is found at once, by all ranks alike, and never by an import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_overlap import ConfigError, MoELayer, config
from moe_overlap.commands import cli, info
from moe_overlap.transport import LocalTransport, ProcessGroupTransport
from tests.ranks import gloo_pool

ROOT = Path(__file__).resolve().parents[1]
BAD = {
    "MOE_OVERLAP_TIMEOUT_S": "0",
    "MOE_OVERLAP_SLOW_PEER_S": "soon",
    "MOE_OVERLAP_EXCHANGE_SMS": "2.5",
    "MOE_OVERLAP_TILES": "dealing",
}


def test_every_variable_has_a_bad_value_here():
    assert set(BAD) == {variable.name for variable in config.VARIABLES}
    config.check_environment()


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_a_layer_is_not_made_with_a_bad_value(name, value, monkeypatch):
    """With a limit of its own too, on one rank too, and where only a GPU would ask for the variable."""
    monkeypatch.setenv(name, value)
    for make in (config.check_environment, lambda: MoELayer(8, 8, 2, 1), lambda: LocalTransport(timeout_s=1.0)):
        with pytest.raises(ConfigError, match=f"{name} = '{value}': expected"):
            make()


def refused_then_made(name: str, value: str) -> str:
    os.environ[name] = value
    try:
        with pytest.raises(ConfigError) as caught:
            MoELayer(8, 8, 4, 2, group=dist.group.WORLD)
    finally:
        del os.environ[name]
    layer = MoELayer(8, 8, 4, 2, transport=ProcessGroupTransport(dist.group.WORLD, timeout_s=20.0))
    assert layer(torch.randn(3, 8)).shape == (3, 8)
    return caught.value.field


def test_all_ranks_refuse_it_and_the_group_stays_usable():
    for name, value in BAD.items():
        assert gloo_pool(2).run(refused_then_made, name, value) == [name, name]


@pytest.mark.parametrize("words", ["plan", "place", "train", "calibrate", "verify x:y", "bench layer", "bench ops"])
def test_commands_refuse_it_before_all_else(words, monkeypatch, capsys):
    monkeypatch.setenv("MOE_OVERLAP_TILES", "dealing")
    assert cli.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "MOE_OVERLAP_TILES = 'dealing': expected in_turn or dealt" in line


def test_info_tells_of_every_bad_value_and_of_names_that_nobody_reads(monkeypatch, capsys):
    for name, value in BAD.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MOE_OVERLAP_TILE", "dealt")
    for name in config.READ_ELSEWHERE:
        monkeypatch.setenv(name, "")
    assert cli.main(["info"]) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    for name, value in BAD.items():
        assert any(f"{name} = '{value}': expected" in line for line in warnings)
    assert "nothing reads MOE_OVERLAP_TILE:" in warnings[-1] and len(warnings) == len(BAD) + 1
    for name in BAD:
        monkeypatch.delenv(name)
    monkeypatch.delenv("MOE_OVERLAP_TILE")
    assert not any("WARNING" in line for line in info.lines())


def test_an_import_does_not_look():
    command = [sys.executable, "-c", "import moe_overlap; moe_overlap.MoELayer"]
    subprocess.run(command, cwd=ROOT, env=os.environ | BAD, check=True, timeout=300)
