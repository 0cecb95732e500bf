"""The job's options: what is refused, and how it says so."""

import pytest

from moe_overlap.commands import cli
from moe_overlap.commands.train.options import TrainOptions, parse
from moe_overlap.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "nothing/here"], ["--text", "nothing/here", "text file"]),
        (["--steps", "0"], ["--steps", "0", "from 1"]),
        (["--steps", "many"], ["--steps", "many", "int"]),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(options, words, tmp_path, capsys):
    try:
        status = cli.main(["train", "--out", str(tmp_path / "out"), *options])
    except SystemExit as ended:
        status = ended.code
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kind": "top3"}, "--kind"),
        ({"layers": 3}, "--layers"),
        ({"batch": 3, "ranks": 2}, "--batch"),
        ({"experts": 3, "batch": 8, "ranks": 2}, "--experts"),
        ({"experts": 1, "ranks": 1}, "--experts"),
        ({"hidden": 96}, "--hidden"),
        ({"hidden": 31}, "--hidden"),
        ({"lr": float("nan")}, "--lr"),
        ({"vocab": 100}, "--vocab"),
        ({"balance": "evenly"}, "--balance"),
        ({"balance_coef": -0.1}, "--balance-coef"),
        ({"balance_coef": float("nan")}, "--balance-coef"),
        ({"balance": "loss-free", "balance_coef": 0.0}, "--balance-coef"),
        ({"overlap": "maybe"}, "--overlap"),
        ({"schedule": "serial"}, "--schedule"),
        ({"kind": "top2", "schedule": "chunked(17)"}, "--schedule"),
        ({"kind": "top2", "schedule": "shared_expert"}, "--schedule"),
        ({"schedule": "auto", "slot": 1}, "--schedule"),
        ({"schedule": "auto", "chunks": 2}, "--schedule"),
        ({"kind": "top2", "slot": 1}, "--slot"),
        ({"kind": "top2", "chunks": 2}, "--chunks"),
        ({"slot": 4}, "--slot"),
        ({"chunks": 17}, "--chunks"),
        ({"link": "fast"}, "--link"),
        ({"link": "1gbit", "ranks": 1}, "--link"),
        ({"link": "1gbit", "ranks_per_node": 2}, "--link"),
        ({"compare_overlap": True, "resume": "x"}, "--compare-overlap"),
    ],
)
def test_bad_options_name_the_option(options, field):
    with pytest.raises(ConfigError) as caught:
        TrainOptions(**options)
    assert caught.value.field == field and caught.value.expected


def test_options_round_trip_through_the_command_line():
    options = parse(["--kind", "top2", "--schedule", "chunked(4)", "--lr", "0.001", "--compare-overlap"])
    assert options == TrainOptions(kind="top2", schedule="chunked(4)", lr=0.001, compare_overlap=True)
