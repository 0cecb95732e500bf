"""All mutants and right variants, by the layer that they are of (`judging.ADAPTERS`)."""

from __future__ import annotations

from tests.verify import variants
from tests.verify.mutants_dedup import DEDUPLICATED
from tests.verify.mutants_ours import IN_DDP, OURS
from tests.verify.mutants_plain import PLAIN

MUTANTS = {"plain": PLAIN, "ours": OURS, "ours deduplicated": DEDUPLICATED, "ours in DDP": IN_DDP}
VARIANTS = {
    "plain": variants.PLAIN,
    "ours": variants.OURS,
    "ours deduplicated": variants.DEDUPLICATED,
    "ours in DDP": variants.IN_DDP,
}
