"""reduce_gradients: the aggregate in loops without DDP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import launch, run
from oracle import min_norm_point
from ranks import SIZES, flat, local_gradients, loss, network, relative_error, same_everywhere
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import grain_ddp.loop as loop_module
from grain_ddp import GrainState, grain_hook, reduce_gradients


def train(scope: str, bucket_bytes: int) -> Any:
    loop_module.BUCKET_BYTES = bucket_bytes
    state, model = GrainState(scope=scope), network()
    worst, buckets = 0.0, 0
    for step in range(3):
        expected = torch.from_numpy(min_norm_point(local_gradients(model, step)))
        model.zero_grad()
        loss(model, step).backward()
        before = [p.grad.data_ptr() for p in model.parameters()]
        record = reduce_gradients(model.parameters(), state)
        assert record is state.last
        assert [p.grad.data_ptr() for p in model.parameters()] == before  # in place
        found = flat(p.grad for p in model.parameters())
        assert same_everywhere(found)
        if scope == "global":
            worst = max(worst, relative_error(found, expected))
        else:
            buckets = len(record.weights)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
    return worst, buckets


@pytest.mark.parametrize("n", SIZES)
def test_equals_an_independent_solver(n: int) -> None:
    for bucket_bytes in (25 << 20, 2000):
        assert max(error for error, _ in run(n, train, "global", bucket_bytes)) < 1e-5
    assert run(n, train, "bucket", 2000)[0][1] > 1


class Odd(nn.Module):
    """A gradient that is not contiguous, one of another dtype, and one that is seldom there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turned = nn.Parameter(torch.randn(7, 5).T)
        self.wide = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.seldom = nn.Parameter(torch.randn(5))
        self.never = nn.Parameter(torch.randn(5))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)

    def forward(self, rank: int) -> torch.Tensor:
        x = torch.linspace(-1, 1, 5) * (rank + 1) + rank
        value = (torch.tanh(x @ self.turned).sum() + torch.sin(self.wide * x).sum()).float()
        return value + (self.seldom * x).sum() if rank == 1 else value


def odd() -> Any:
    rank = dist.get_rank()
    rows = []
    for other in range(dist.get_world_size()):
        twin = Odd()
        twin(other).backward()
        grads = [twin.turned.grad, twin.wide.grad, twin.seldom.grad]
        rows.append(flat(torch.zeros(5) if g is None else g.double() for g in grads))
    model = Odd()
    model(rank).backward()
    reduce_gradients(model.parameters(), GrainState())
    assert model.never.grad is None
    found = flat(g.double() for g in (model.turned.grad, model.wide.grad, model.seldom.grad))
    assert same_everywhere(found)
    return relative_error(found, torch.from_numpy(min_norm_point(torch.stack(rows))))


def test_odd_gradients() -> None:
    assert max(run(3, odd)) < 1e-5


def other_shapes() -> None:
    p = nn.Parameter(torch.ones(3 + dist.get_rank()))
    p.grad = torch.ones_like(p)
    reduce_gradients([p], GrainState())


def other_count() -> None:
    ps = [nn.Parameter(torch.ones(3)) for _ in range(1 + dist.get_rank())]
    for p in ps:
        p.grad = torch.ones_like(p)
    reduce_gradients(ps, GrainState())


def sparse_somewhere() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3).to_sparse() if dist.get_rank() == 1 else torch.ones(3)
    reduce_gradients([p], GrainState())


def nothing() -> None:
    reduce_gradients([nn.Parameter(torch.ones(3))], GrainState())


def no_parameters() -> None:
    reduce_gradients([], GrainState())


def state_of_a_ddp_model() -> None:
    state = GrainState()
    model = DistributedDataParallel(network())
    model.register_comm_hook(state, grain_hook)
    loss(model, 0).backward()
    reduce_gradients(model.parameters(), state)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (other_shapes, "parameter 0 (shape and dtype) must be the same on every rank"),
        (other_count, "parameter 1 (shape and dtype) must be the same on every rank"),
        (sparse_somewhere, "parameters [0] have sparse ones"),
        (nothing, "no parameter has a gradient on any rank"),
        (no_parameters, "no parameter has a gradient on any rank"),
        (state_of_a_ddp_model, "this GrainState serves the DDP model Sequential"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_errors_on_every_rank(function: Any, message: str) -> None:
    for outcome in launch(2, function, timeout=10):
        assert outcome.error is not None
        assert message in outcome.error


def test_without_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match="Start with torchrun"):
        reduce_gradients([nn.Parameter(torch.ones(3))], GrainState())


def test_a_model_stands_for_its_parameters() -> None:
    def passes(given: Any) -> Tensor:
        model.zero_grad()
        for x in (1.0, -3.0):
            model(torch.full((1, 2), x)).sum().backward()
            reduce_gradients(given, state)
        return flat(p.grad for p in model.parameters())

    model = nn.Linear(2, 1)
    results = []
    for given in (list(model.parameters()), model, list(model.named_parameters())):
        state = GrainState(microbatches=2)
        results.append(passes(given))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    with pytest.raises(TypeError, match=r"expected a model, or its parameters\(\), but found str"):
        reduce_gradients(["weight"], GrainState(microbatches=2))  # type: ignore[list-item]
    with pytest.raises(TypeError, match="expected a GrainState, but found list"):
        reduce_gradients(model.parameters(), [])  # type: ignore[arg-type]
