"""TorchJD's weightings as they are: `GrainState(weighting=UPGradWeighting())`."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import run
from ranks import flat, local_gradients, loss, network, relative_error, same_everywhere
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook, reduce_gradients
from grain_ddp._math.weighting import weigh

torchjd = pytest.importorskip("torchjd.aggregation")

# Each with the aggregator of whole gradients that it belongs to; Krum needs three groups.
PAIRS: dict[str, tuple[Callable[[int], Any], Callable[[int], Any]]] = {
    "AlignedMTL": (lambda n: torchjd.AlignedMTLWeighting(), lambda n: torchjd.AlignedMTL()),
    "CAGrad": (lambda n: torchjd.CAGradWeighting(0.5), lambda n: torchjd.CAGrad(0.5)),
    "Constant": (
        lambda n: torchjd.ConstantWeighting(torch.arange(1.0, n + 1)),
        lambda n: torchjd.Constant(torch.arange(1.0, n + 1).double()),
    ),
    "DualProj": (lambda n: torchjd.DualProjWeighting(), lambda n: torchjd.DualProj()),
    "FairGrad": (lambda n: torchjd.FairGradWeighting(1.0), lambda n: torchjd.FairGrad(1.0)),
    "GradVac": (lambda n: torchjd.GradVacWeighting(), lambda n: torchjd.GradVac()),
    "IMTLG": (lambda n: torchjd.IMTLGWeighting(), lambda n: torchjd.IMTLG()),
    "Krum": (lambda n: torchjd.KrumWeighting(0), lambda n: torchjd.Krum(0)),
    "MGDA": (lambda n: torchjd.MGDAWeighting(), lambda n: torchjd.MGDA()),
    "Mean": (lambda n: torchjd.MeanWeighting(), lambda n: torchjd.Mean()),
    "PCD": (lambda n: torchjd.PCDWeighting(), lambda n: torchjd.PCD()),
    "PCGrad": (lambda n: torchjd.PCGradWeighting(), lambda n: torchjd.PCGrad()),
    "Random": (lambda n: torchjd.RandomWeighting(), lambda n: torchjd.Random()),
    "Sum": (lambda n: torchjd.SumWeighting(), lambda n: torchjd.Sum()),
    "UPGrad": (lambda n: torchjd.UPGradWeighting(), lambda n: torchjd.UPGrad()),
}
SUM_TO_ONE = {"IMTLG", "Krum", "MGDA", "Mean", "Random"}
NO_CONFLICT = {"DualProj", "UPGrad"}


def under_ddp(names: list[str]) -> dict[str, Any]:
    """For each one, over some steps: the largest error against wᵀJ and against TorchJD's own
    aggregator of the gathered gradients; the sums of the weights; the conflicts."""
    found = {}
    for name in names:
        n = torch.distributed.get_world_size()
        make, make_aggregator = PAIRS[name]
        state, aggregator = GrainState(weighting=make(n)), make_aggregator(n)
        model = DistributedDataParallel(network())
        model.register_comm_hook(state, grain_hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        worst, sums, conflicts = 0.0, [], 0
        for step in range(3):
            rows = local_gradients(model.module, step)
            before = torch.random.get_rng_state()
            optimizer.zero_grad()
            loss(model, step).backward()
            assert torch.equal(before, torch.random.get_rng_state())
            gradient = flat(p.grad for p in model.parameters())
            assert state.last is not None
            assert state.last.status == "custom"
            weights = torch.from_numpy(state.last.weights)
            assert same_everywhere(weights)
            assert same_everywhere(gradient)
            with torch.random.fork_rng():
                torch.manual_seed(step)
                theirs = aggregator(rows)
            worst = max(worst, relative_error(gradient, weights @ rows))
            # Theirs has a Gramian of its own, and some of them stop iterating early.
            assert relative_error(gradient, theirs) < 1e-3, name
            sums.append(float(weights.sum()))
            conflicts += state.last.conflicts_aggregate
            optimizer.step()
        found[name] = worst, sums, conflicts
    return found


@pytest.mark.parametrize("n", [2, 3])
def test_under_ddp(n: int) -> None:
    names = [name for name in PAIRS if n > 2 or name != "Krum"]
    for ranks in run(n, under_ddp, names, deadline=120):
        assert set(ranks) == set(names)
        for name, (worst, sums, conflicts) in ranks.items():
            assert worst < 1e-5, name
            if name in SUM_TO_ONE:
                np.testing.assert_allclose(sums, 1, rtol=1e-6)
            if name in ("PCGrad", "GradVac", "Sum"):
                assert min(sums) > n - 1e-6
            if name in NO_CONFLICT:
                assert conflicts == 0


def by_autograd(gramian: torch.Tensor) -> torch.Tensor:
    """Projected gradient descent that leaves the derivative to torch, and returns float32."""
    assert gramian.dtype == torch.float64
    assert gramian.device.type == "cpu"
    weights = torch.full((len(gramian),), 1 / len(gramian), dtype=torch.float64)
    weights.requires_grad_()
    for _ in range(3):
        (derivative,) = torch.autograd.grad(weights @ gramian @ weights, weights)
        step = weights - 0.1 / gramian.trace() * derivative
        weights = (step.clamp_min(0) / step.clamp_min(0).sum()).detach().requires_grad_()
    return weights.float() * 1


class Dropped(nn.Module):
    """Has a mode, draws at random, and its result wants a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, gramian: torch.Tensor) -> torch.Tensor:
        return self.scale * self.drop(torch.ones(len(gramian)))


def odd_ones() -> list[tuple[float, list[float]]]:
    found = []
    for make in (lambda: by_autograd, Dropped):
        for loop in (False, True):
            weighting = make()
            state = GrainState(weighting=weighting)
            model: nn.Module = network()
            rows = local_gradients(model, 0)
            if not loop:
                model = DistributedDataParallel(model)
                model.register_comm_hook(state, grain_hook)
            loss(model, 0).backward()
            if loop:
                reduce_gradients(model.parameters(), state)
            assert state.last is not None
            weights = torch.from_numpy(state.last.weights)
            assert same_everywhere(weights)
            error = relative_error(flat(p.grad for p in model.parameters()), weights @ rows)
            found.append((error, weights.tolist()))
            if isinstance(weighting, nn.Module):
                assert weighting.training
    return found


@pytest.mark.parametrize("n", [2, 3])
def test_weightings_that_want_autograd_float32_or_a_mode(n: int) -> None:
    for ranks in run(n, odd_ones):
        assert max(error for error, _ in ranks) < 1e-5
        (_, ddp), (_, loop), (_, dropped), _ = ranks
        np.testing.assert_allclose(ddp, loop, rtol=1e-6)
        assert sum(ddp) == pytest.approx(1)
        assert set(dropped) <= {0.0, 2.0}


def test_a_state_of_its_own_is_pickled_and_left_out_of_the_state_dict() -> None:
    weighting = torchjd.GradVacWeighting()
    state = GrainState(weighting=weighting)
    gramian = np.array([[1.0, -0.5], [-0.5, 1.0]])
    weigh(gramian, weighting)
    copy = pickle.loads(pickle.dumps(state)).weighting
    assert copy._phi_t is not None
    # What it has learnt makes a difference, and is there.
    first = weigh(gramian, torchjd.GradVacWeighting()).weights
    second = weigh(gramian, copy).weights
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(second, weigh(gramian, weighting).weights)
    assert "weighting" not in state.state_dict()


@pytest.mark.parametrize("name", ["UPGrad", "MGDA", "ConFIG"])
def test_an_aggregator_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a TorchJD aggregator"):
        GrainState(weighting=getattr(torchjd, name)())
