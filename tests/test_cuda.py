"""On a GPU: nothing waits on the host, streams are in order, results are those of the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run
from oracle import min_norm_point
from ranks import batch, flat, local_gradients, network, relative_error, same_everywhere
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook
from grain_ddp._core.aggregation import Aggregation
from grain_ddp._math.record import PendingRecord
from grain_ddp._wire.wire import Transfer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COUNTS = sorted({1, max(torch.cuda.device_count(), 1)})
BENCHMARK = Path(__file__).parents[1] / "docs" / "benchmarks" / "gpu.py"


def local_wire(n: int) -> Any:
    """n ranks in one GPU: see the benchmark."""
    spec = importlib.util.spec_from_file_location("gpu_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LocalWire(n)


def through_nccl(options: dict[str, Any], steps: int) -> Any:
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    group = dist.new_group(backend="nccl")
    twin = network()
    model = network().to(device)
    ddp = DistributedDataParallel(model, process_group=group, bucket_cap_mb=0.002)
    state = GrainState(**options)
    ddp.register_comm_hook(state, grain_hook)
    errors = []
    for step in range(steps):
        twin.load_state_dict(model.state_dict())
        rows = local_gradients(twin, step)
        x, y = (t.to(device) for t in batch(step))
        ddp.zero_grad()
        loss = torch.nn.functional.cross_entropy(ddp(x), y)
        torch.cuda.synchronize()
        if step > 2:  # by now kernels and communicators are there, and DDP has built its buckets
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert isinstance(state.last, PendingRecord)
        found = flat(p.grad for p in model.parameters()).cpu()
        assert same_everywhere(found)
        products = rows @ found.double()
        errors.append((relative_error(found, torch.from_numpy(min_norm_point(rows))), products))
        assert state.last.weights.shape[-1] == dist.get_world_size()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    return errors


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_ddp_with_nccl_without_a_wait(n: int, scope: str) -> None:
    errors = run(n, through_nccl, {"scope": scope}, 6, timeout=120, deadline=400)[0]
    assert all((products >= -1e-5 * products.abs().max()).all() for _, products in errors)
    if scope == "global":
        assert max(error for error, _ in errors) < 1e-5


def step(
    wire: Any, scope: str, buffers: list[torch.Tensor], spoil: bool
) -> tuple[list[torch.Tensor], Any]:
    aggregation = Aggregation(GrainState(scope=scope), wire)
    results = [buffer.clone() for buffer in buffers]
    for result in results:
        aggregation.push(result)
        if spoil:
            for buffer in buffers:  # what is free by now is overwritten
                for part in (1, wire.size):
                    torch.full((len(buffer) // part,), float("nan"), device="cuda")
    record = aggregation.finish()
    if spoil:
        torch.full((sum(map(len, buffers)),), float("nan"), device="cuda")
    return results, record


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scope", ["global", "bucket"])
@pytest.mark.parametrize("n", [2, 5, 8, 64])
def test_n_ranks_in_one_gpu(n: int, scope: str, dtype: torch.dtype) -> None:
    buffers = [torch.randn(n * 7001, device="cuda").to(dtype) for _ in range(4)]
    wire = local_wire(n)
    step(wire, scope, buffers, False)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results, _ = step(wire, scope, buffers, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rows = [buffer.view(n, -1).double().cpu() for buffer in buffers]
    if scope == "bucket":
        exact = [torch.from_numpy(min_norm_point(r)) for r in rows]
    else:
        exact = list(torch.from_numpy(min_norm_point(torch.cat(rows, 1))).split(7001))
    bound = {2: 1e-2, 4: 1e-5, 8: 1e-10}[dtype.itemsize]
    for result, expected in zip(results, exact, strict=True):
        assert relative_error(result.cpu(), expected.repeat(n)) < bound


@pytest.mark.parametrize("scope", ["global", "bucket"])
def test_memory_that_is_free_may_be_overwritten(scope: str) -> None:
    """While the side stream is late, and the compute stream takes what it can."""
    wire = local_wire(4)
    exchange = wire.exchange

    def late(send: Any, receive: Any, *what: Any) -> Transfer:
        torch.cuda._sleep(5_000_000)
        found = exchange(send, receive, *what)
        torch.cuda._sleep(5_000_000)
        return found

    buffers = [torch.randn(4 * 100_003, device="cuda") for _ in range(6)]
    calm, first = step(wire, scope, buffers, False)
    wire.exchange = late
    for _ in range(5):
        results, record = step(wire, scope, buffers, True)
        for found, expected in zip(results, calm, strict=True):
            assert torch.equal(found, expected)
        assert (record.weights == first.weights).all()


def test_a_callable_is_asked_on_the_host() -> None:
    buffers = [torch.randn(3000, device="cuda")]
    state = GrainState(weighting=lambda G: 1 / G.diagonal() / (1 / G.diagonal()).sum())
    aggregation = Aggregation(state, local_wire(3))
    result = buffers[0].clone()
    aggregation.push(result)
    record = aggregation.finish()
    rows = buffers[0].view(3, -1).double()
    weights = 1 / rows.square().sum(1)
    expected = (weights / weights.sum()) @ rows
    assert relative_error(result, expected.repeat(3)) < 1e-5
    assert record is not None
    assert record.status == "custom"
