"""The histograms of a step's record, of ids on the GPU."""

from __future__ import annotations

import pytest
import torch

from moe_overlap.agreement.counts import block_counts, block_counts_of_rows
from moe_overlap.errors import ConfigError

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("tokens", [0, 1, 5000])
def test_counts_of_ids_on_the_gpu_are_those_of_the_cpu(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, 32, generator=generator).argsort(dim=1)[:, :8].to(torch.int32)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.2, -1, ids).to(torch.int32)
    assert torch.equal(block_counts(ids.cuda(), 32), block_counts(ids, 32))
    for got, want in zip(block_counts_of_rows(ids.cuda(), 32, 4), block_counts_of_rows(ids, 32, 4), strict=True):
        assert torch.equal(got, want) and got.device.type == "cpu"


def test_bad_ids_on_the_gpu_are_refused() -> None:
    for token, match in (([1, 1], "= 1.*twice"), ([1, 32], "= 32"), ([-2, 0], "= -2")):
        with pytest.raises(ConfigError, match=match):
            block_counts_of_rows(torch.tensor([token], dtype=torch.int32, device="cuda"), 32, 4)
