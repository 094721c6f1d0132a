"""replay: the machine or the batch, and everything as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run
from ranks import batch, flat, network
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook, reduce_gradients, replay

BAD = 1


class Noisy(torch.autograd.Function):
    """A backward pass that computes wrongly: always, now and then, or by the order of sums."""

    @staticmethod
    def forward(context: Any, x: Tensor, how: str) -> Tensor:
        context.how = how
        return x.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        how = context.how
        Noisy.count += 1
        bad = dist.get_rank() == BAD
        if how == "jitter" or how == "jitter and stuck":  # as of atomics on a GPU
            generator = torch.Generator().manual_seed(1000 * dist.get_rank() + Noisy.count)
            gradient = gradient * (1 + 1e-7 * torch.randn(gradient.shape, generator=generator))
        if bad and ("stuck" in how or (how == "flaky" and Noisy.count % 2)):
            gradient = gradient.clone()
            gradient[:, 0] += 0.01  # all: dropout forgets some
        return gradient, None

    count = 0


def tried(how: str, ddp: bool, given: bool) -> Any:
    inner = nn.Sequential(network(), nn.BatchNorm1d(3), nn.Dropout(0.2))
    state = GrainState(weighting="mean", record_every=50)
    model: Any = inner
    if ddp:
        model = DistributedDataParallel(inner)
        model.register_comm_hook(state, grain_hook)

    def backward(one: Any) -> None:
        x, y = one
        out = model(x)
        nn.functional.cross_entropy(Noisy.apply(out, how), y).backward()

    for step in range(2):
        model.zero_grad()
        backward(batch(step))
        if not ddp:
            reduce_gradients(model.parameters(), state)
    gradients = [p.grad for p in inner.parameters()]
    before = flat([*inner.parameters(), *gradients, *inner.buffers()]).clone()
    random = torch.get_rng_state()
    found = replay(backward, batch(5), state if given else None)
    after = flat([*inner.parameters(), *(p.grad for p in inner.parameters()), *inner.buffers()])
    assert torch.equal(before, after)
    assert all(p.grad is g for p, g in zip(inner.parameters(), gradients, strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert state.step == 2
    return found.machine, [s.rank for s in found.suspects], found.deterministic, str(found)


@pytest.mark.parametrize("how", ["sound", "stuck", "flaky", "jitter", "jitter and stuck"])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_machine_is_told_from_the_batch(how: str, n: int) -> None:
    machine = how not in ("sound", "jitter")
    nobody_knows = n == 2 and "stuck" in how
    for found in run(n, tried, how, n % 2 == 0, n == 3):
        assert found[0] == machine
        assert found[1] == ([0, 1] if nobody_knows else [BAD] if machine else [])
        assert found[2] == ("jitter" not in how)
        assert ("no machine computes wrongly now" in found[3]) != machine


def test_replay_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="replay needs a model that is whole on every rank"):
        replay(lambda batch: None, 0, GrainState())
