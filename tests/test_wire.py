"""The wire: what is sent arrives, sums are equal everywhere, disagreement is told everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import launch, run
from ranks import SIZES, same_everywhere

import grain_ddp._wire.wire as wire_module
from grain_ddp._wire.torch_wire import TorchWire


def exchange(dtype: torch.dtype) -> None:
    """Of different lengths, empty ones too, and several at once, waited for in another order."""
    wire = TorchWire(dist.group.WORLD)
    rank, n = wire.rank, wire.size
    pending = []
    for k in range(3):
        send = [torch.full((3 * i + k * rank,), 100 * rank + i).to(dtype) for i in range(n)]
        receive = [torch.full((3 * rank + k * i,), -1).to(dtype) for i in range(n)]
        pending.append((wire.exchange(send, receive), receive, k))
    for transfer, receive, k in reversed(pending):
        transfer.wait()
        for i, found in enumerate(receive):
            value = -1 if i == rank else 100 * i + rank
            assert torch.equal(found, torch.full((3 * rank + k * i,), value).to(dtype))


@pytest.mark.parametrize("n", SIZES)
def test_exchange(n: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        run(n, exchange, dtype)


def total(limit: int) -> Any:
    wire_module._GATHER_LIMIT = limit
    wire = TorchWire(dist.group.WORLD)
    values = torch.randn(10, dtype=torch.float64) ** 3
    transfer, rows = wire.sum(values.clone())
    transfer.wait()
    summed = rows.sum(0)
    assert same_everywhere(summed)
    return values, summed


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("limit", [1, 32])  # 1: by an all-reduce
def test_sum(n: int, limit: int) -> None:
    every = run(n, total, limit)
    torch.testing.assert_close(every[0][1], torch.stack([values for values, _ in every]).sum(0))


def agree(values: list[Any]) -> bool:
    wire = TorchWire(dist.group.WORLD)
    mine = values[dist.get_rank()]
    same = wire.same(repr(mine), torch.device("cpu"))
    wire.agree({"fine": 1, "thing": mine})
    return same


def test_agreement() -> None:
    assert run(3, agree, ["x", "x", "x"]) == [True] * 3
    for outcome in launch(3, agree, ["x", "y", "x"]):
        assert outcome.error is not None
        assert "thing must be the same on every rank, but it is rank 0: 'x'" in outcome.error
        assert f"this is rank {outcome.rank}" in outcome.error


def same() -> bool:
    return TorchWire(dist.group.WORLD).same(str(dist.get_rank() == 2), torch.device("cpu"))


def test_same_has_one_answer() -> None:
    assert run(3, same) == [False] * 3
    assert run(2, same) == [True] * 2
