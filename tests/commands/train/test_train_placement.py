"""Experts that move and are copied while the job trains."""

import json
from dataclasses import replace

import pytest
import torch

from moe_overlap.commands.train.checkpoint import MANIFEST, sealed
from moe_overlap.commands.train.placing import left_behind, moves, say_moves
from moe_overlap.commands.train.report import RunLog
from moe_overlap.errors import ConfigError
from moe_overlap.placement import Placement
from tests.commands.train.jobs import SMALL, events, losses, run, run_on_two
from tests.tolerances import close

CHOSEN = ("--kind", "top2", "--layers", 4, "--experts", 8, "--steps", 20)
MOVING = ("--placement-every", 2, "--placement-slots", 2)


@pytest.fixture(scope="module")
def still(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("still")
    assert run_on_two(text, out, *CHOSEN) == [0, 0]
    return torch.tensor(losses(out))


def placements(out):
    return [one for event in events(out, "step") for one in event["placement"]]


@pytest.mark.parametrize("planner", ["flex", "eplb"])
def test_a_run_whose_experts_move_and_its_resumptions_have_the_static_losses(planner, text, tmp_path, still):
    moving = (*CHOSEN, *MOVING, "--placement", planner, "--checkpoint-every", 10)
    assert run_on_two(text, tmp_path / "whole", *moving) == [0, 0]
    close(torch.tensor(losses(tmp_path / "whole")), still)
    made = placements(tmp_path / "whole")
    assert sum(one["migrated"] for one in made) and all(one["copies"] <= 4 for one in made)
    assert planner == "flex" or sum(one["expanded"] for one in made)
    saved = tmp_path / "whole" / "checkpoints" / "step-000010"
    assert len(json.loads((saved / MANIFEST).read_text())["placements"]) == 2
    for other in (planner, "proportional", "static"):
        out = tmp_path / other
        options = (*CHOSEN, *MOVING, "--placement", other, "--resume", saved)
        assert run_on_two(text, out, *options) == [0, 0]
        close(torch.tensor(losses(out)), still[10:])


def test_a_checkpoint_of_moved_experts_goes_on_with_one_rank(text, tmp_path, still):
    options = (*CHOSEN, *MOVING, "--placement", "eplb", "--checkpoint-every", 10, "--balance", "global")
    assert run_on_two(text, tmp_path / "two", *options) == [0, 0]
    folder = tmp_path / "two" / "checkpoints" / "step-000010"
    assert run(text, tmp_path / "one", *CHOSEN, "--ranks", 1, "--balance", "global", "--resume", folder) == 0
    close(torch.tensor(losses(tmp_path / "one")), torch.tensor(losses(tmp_path / "two"))[10:])
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(sealed(manifest | {"placements": [{"homes": 1}]})))
    with pytest.raises(ConfigError, match="placements"):
        run(text, tmp_path / "bad", *CHOSEN, "--ranks", 1, "--balance", "global", "--resume", folder)


def test_what_became_of_a_placement_is_said(tmp_path, capsys):
    old = Placement.of_ranks([[0, 1, 2], [2, 3]], homes=[0, 0, 1, 1])
    new = Placement.of_ranks([[0, 3], [1, 2, 3]], homes=[0, 1, 1, 1])
    found = moves(1, old, new)
    assert (found["expanded"], found["shrunk"], found["migrated"], found["copies"]) == (1, 1, 1, 1)
    said = say_moves(4, found | {"bytes": 2e6})
    assert "1 expanded, 1 shrunk, 1 migrated (2.00 MB on the busiest port), now 0,3 | 1,2,3" in said
    with RunLog(tmp_path / "log", active=True, append=False, steps=100) as log:
        log.begin_bar("title", 0)
        log.step({"step": 4, "loss": 1.0, "tokens_per_s": 1.0, "placement": [found | {"bytes": 2e6}]})
    assert capsys.readouterr().err == said + "\n"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"placement_slots": 1}, ""),
        ({"placement_slots": 0}, "--placement-slots"),
        ({"placement": "static"}, "--placement static"),
        ({"ranks": 4}, "other ranks"),
    ],
)
def test_what_a_resumed_run_leaves_behind_is_said(options, said):
    saved = [Placement.of_ranks([[0, 1, 2], [2, 3]], homes=[0, 0, 1, 1])]
    text = left_behind(saved, replace(SMALL, **{"ranks": 2, "placement": "flex"} | options))
    assert said in text and bool(text) == bool(said)
    assert left_behind([], SMALL) == ""


@pytest.mark.parametrize("option, value", [("--placement", "magic"), ("--placement-every", 0),
                                           ("--placement-slots", -1)])  # fmt: skip
def test_bad_placement_options_are_refused(option, value, text, tmp_path):
    with pytest.raises(ConfigError, match=option):
        run(text, tmp_path, "--ranks", 2, option, value)


def test_slots_that_an_expert_would_fill_twice_are_refused_before_anything_runs():
    for planner in ("flex", "eplb", "proportional"):
        with pytest.raises(ConfigError, match="--placement-slots = 5: expected at most 4"):
            replace(SMALL, ranks=2, experts=8, placement=planner, placement_slots=5)
        replace(SMALL, ranks=2, experts=8, placement=planner, placement_slots=4)
    replace(SMALL, ranks=2, experts=8, placement="static", placement_slots=5)


def test_one_rank_has_nothing_to_place(text, tmp_path):
    with pytest.raises(ConfigError, match="static on one rank"):
        run(text, tmp_path, "--ranks", 1, "--placement", "flex")
