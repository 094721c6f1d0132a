"""The Triton kernels: compiled where there is a GPU, else in Triton's interpreter."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import min_norm_point
from ranks import flat, local_gradients, loss, network, relative_error, same_everywhere
from test_gramian import of_all_scales, relative_to_norms
from test_solver import KINDS, ZERO_PIVOT, gradients, near_singular, own_gap
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from grain_ddp import GrainState, StepRecord, grain_hook, min_norm
from grain_ddp._core.aggregation import Aggregation
from grain_ddp._math import gramian as gramian_module
from grain_ddp._math import weighting as weighting_module
from grain_ddp._math.record import PendingRecord
from grain_ddp._math.sketch import Sketch
from grain_ddp._math.weighting import DeviceWeights, weigh
from grain_ddp._wire import neighbours as neighbours_module
from grain_ddp._wire.torch_wire import TorchWire

pytest.importorskip("triton", minversion="3.7")
from grain_ddp._math import kernels
from grain_ddp._math.kernel_solver import weights_on_device

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN, INF = float("nan"), float("inf")


# The passes.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 9, 33])
def test_gramian(n: int, dtype: torch.dtype) -> None:
    wide = torch.randn(n, 12_000, device=DEVICE).to(dtype)
    for columns in (0, 1, 300, 8197):
        rows = wide[:, 7 : 7 + columns]
        exact = rows.double() @ rows.double().T
        found = kernels.gramian(rows)
        assert found.dtype == torch.float64
        assert (found - exact).abs().max() <= 3e-7 * exact.diagonal().max()
        assert torch.equal(found, kernels.gramian(rows))  # bit by bit


def test_correlated_rows_keep_their_differences() -> None:
    rows = torch.randn(1, 100_000) + 1e-2 * torch.randn(20, 100_000)
    exact = rows.double() @ rows.double().T
    error = (kernels.gramian(rows.to(DEVICE)).cpu() - exact).abs().max() / exact.max()
    assert error < 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [700, 3000])
def test_sketch(k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sums as without kernels, whatever parts are added; and squares at any scale."""
    monkeypatch.setattr(gramian_module, "DEVICES", {DEVICE})
    row = torch.randn(5000, device=DEVICE).to(dtype)
    row[100:200] *= 1e-30 if dtype != torch.float16 else 1
    row[4000:] *= 1e30 if dtype != torch.float16 else 1
    ours, plain = Sketch(k, row, 7), Sketch(k, row, 7)
    plain._by_kernel = False
    for part in row.split([1, 699, 0, 2300, 2000]):
        ours.add(part)
        plain.add(part)
    assert ours.count == 5000
    assert ours._by_kernel
    torch.testing.assert_close(ours.values, plain.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.square, plain.square.to(DEVICE), rtol=1e-6, atol=0)


def test_a_sketch_of_more_numbers_than_int32_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gramian_module, "DEVICES", {DEVICE})
    row = torch.randn(5000, device=DEVICE)
    ours, plain = Sketch(1500, row, 7), Sketch(1500, row, 7)
    plain._by_kernel = False
    for sketch in (ours, plain):
        sketch.count = 2**31 - 100  # were added before
        sketch.add(row)
    torch.testing.assert_close(ours.values, plain.values, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.square, plain.square.to(DEVICE), rtol=1e-6, atol=0)
    row[3] = NAN
    ours.add(row)
    assert ours.square.isnan()


@pytest.mark.parametrize("n", [2, 17])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e19, 1e30])
def test_squares_outside_of_fp32(scale: float, n: int) -> None:
    """Also where another row is at another scale, or zero."""
    rows = torch.randn(n, 5000) * scale
    rows[0] /= scale
    if n > 2:
        rows[1] = 0
    exact = rows.double() @ rows.double().T
    norms = exact.diagonal().sqrt()
    error = (kernels.gramian(rows.to(DEVICE)).cpu() - exact).abs()
    assert (error <= 1e-6 * norms[:, None] * norms).all()


@pytest.mark.parametrize("n", [3, 11, 12])
def test_rows_of_all_scales_in_one_matrix(n: int) -> None:
    rows = of_all_scales(n, 5000)
    if DEVICE == "cuda":  # which may take denormals for zero
        rows[rows.abs() < torch.finfo(torch.float32).tiny] = 0
    assert relative_to_norms(kernels.gramian(rows.to(DEVICE)).cpu(), rows) < 1e-6


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_non_finite_row_leaves_the_others_alone(bad: float) -> None:
    rows = torch.randn(3, 5000)
    rows[1, 4711] = bad
    found = kernels.gramian(rows.to(DEVICE)).cpu()
    assert not found[1, 1].isfinite()
    kept = rows[[0, 2]].double()
    torch.testing.assert_close(found[::2, ::2], kept @ kept.T, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 2, 9, 65])
def test_weighted_sum(n: int, dtype: torch.dtype) -> None:
    rows = torch.randn(n, 3001, device=DEVICE).to(dtype)[:, 1:]
    weights = torch.rand(n, dtype=torch.float64, device=DEVICE)
    exact = (weights @ rows.double()).to(dtype)
    out = torch.empty(3000, dtype=dtype, device=DEVICE)
    kernels.weighted_sum(rows, weights, out)
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(out, exact, **close)
    kernels.weighted_sum(rows, weights, rows[n // 2])
    torch.testing.assert_close(rows[n // 2], exact, **close)


def test_rows_of_weight_zero_are_not_read() -> None:
    rows = torch.ones(3, 100, device=DEVICE)
    rows[1] = NAN
    weights = torch.tensor([0.5, 0, 0.25], dtype=torch.float64, device=DEVICE)
    out = torch.empty(100, device=DEVICE)
    kernels.weighted_sum(rows, weights, out)
    assert (out == 0.75).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_weighted_sum(dtype: torch.dtype) -> None:
    rows = torch.randn(3, 3000).to(dtype)
    rows[2] = -rows[0] + 1e-3 * rows[1]
    weights = torch.tensor([0.5, 1e-4, 0.5], dtype=torch.float64)
    out = torch.empty(3000, dtype=dtype, device=DEVICE)
    kernels.weighted_sum(rows.to(DEVICE), weights.to(DEVICE), out, exact=True)
    exact = (weights @ rows.double()).to(dtype)
    torch.testing.assert_close(out.cpu(), exact, rtol=torch.finfo(dtype).eps, atol=0)


def test_a_weight_that_leaves_fp32_takes_part() -> None:
    rows = torch.tensor([[1e30, 3e30], [1e-30, 1e-30]], device=DEVICE)
    weights = torch.tensor([-1e-60, 1.0], dtype=torch.float64, device=DEVICE)
    out = torch.empty(2, device=DEVICE)
    kernels.weighted_sum(rows, weights, out)
    torch.testing.assert_close(out.cpu(), torch.tensor([0, -2e-30]), rtol=1e-6, atol=1e-37)


# The weights.


def device_weights(G: np.ndarray, cap: float | None = None) -> np.ndarray:
    found = weights_on_device(torch.from_numpy(G).to(DEVICE), "min_norm", cap, False)
    w = found.cpu().numpy()[: len(G)]
    assert found[-1] == 1  # to its own conditions
    assert w.min() >= 0
    assert abs(w.sum() - 1) < 1e-14
    return w


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_optimal(kind: str, n: int) -> None:
    for seed, cap in enumerate([None, None, 1, 1.01, 1.5, 4.5]):
        A = gradients(kind, n, seed)
        if not A.any():
            continue  # an absent group: see below
        G = A @ A.T
        w = device_weights(G, cap)
        mean = np.diagonal(G).mean()
        assert own_gap(G, w, cap) <= 1e-12 * mean
        assert abs(w @ G @ w - min_norm(G, cap=cap).norm_squared) <= 1e-12 * mean
        if cap is not None and cap < n:
            assert w.max() <= cap / n * (1 + 1e-14)


@pytest.mark.parametrize(
    ("kind", "n"), [("correlated", 64), ("spread norms", 64), ("rank n/2", 33)]
)
def test_optimal_of_many(kind: str, n: int) -> None:
    """The last one needs the interior point method."""
    A = gradients(kind, n, 0)
    assert own_gap(A @ A.T, device_weights(A @ A.T), None) <= 1e-12 * (A * A).sum() / n


def test_near_singular() -> None:
    rng = np.random.default_rng(1)
    lower = np.zeros((8, 8))
    lower[np.tril_indices(8)] = ZERO_PIVOT
    for G in [lower + np.tril(lower, -1).T, *(near_singular(rng) for _ in range(60))]:
        found = weights_on_device(torch.from_numpy(G).to(DEVICE), "min_norm", None, False)
        w, indefinite = found.cpu().numpy()[: len(G)], max(-np.linalg.eigvalsh(G)[0], 0)
        assert w.min() >= 0
        assert abs(w.sum() - 1) < 1e-14
        assert own_gap(G, w, None) <= 1e-12 * np.diagonal(G).mean() + 10 * indefinite


@st.composite
def hard(draw: st.DrawFn, far: tuple[int, ...] = ()) -> np.ndarray:
    """Small integers, so that ranks, equal rows, opposite rows and zeros are exact; then scales."""
    n, d = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    entries = st.lists(st.integers(-2, 2), min_size=d, max_size=d)
    rows = np.array(draw(st.lists(entries, min_size=n, max_size=n)), float)
    powers = st.sampled_from([0, 0, 0, -30, 20, *far])
    exponents = draw(st.lists(powers, min_size=n, max_size=n))
    return rows * np.exp2(exponents)[:, None]


@settings(max_examples=40, deadline=None)
@given(
    # A cap that forces rows 1e30 times the others' on the result may end in "stalled".
    st.tuples(hard(far=(-100, 100)), st.none()) | st.tuples(hard(), st.sampled_from([1, 1.5, 2])),
    st.sampled_from(["min_norm", "inverse_norm"]),
)
def test_it_is_what_the_cpu_makes_of_it(case: tuple[np.ndarray, float | None], rule: str) -> None:
    A, cap = case
    G = A @ A.T
    cap = cap if rule == "min_norm" else None
    expected = weigh(G, rule, cap=cap)
    on_device = DeviceWeights(torch.from_numpy(G).to(DEVICE), rule, cap, "propagate")
    found = on_device.read()
    assert (found.active, found.dropped) == (expected.active, expected.dropped)
    mean = np.diagonal(G).mean()
    w, other = found.weights, expected.weights
    assert w @ G @ w == pytest.approx(other @ G @ other, rel=1e-12, abs=1e-12 * mean)
    assert found.gap == pytest.approx(expected.gap, rel=1e-9, abs=1e-12 * mean)
    assert found.status == expected.status
    assert w.sum() == pytest.approx(other.sum())
    for dtype in (torch.float32, torch.float64):
        factors = on_device.factors_for(torch.empty(0, dtype=dtype, device=DEVICE)).cpu()
        assert bool(factors.any()) == expected.factors(dtype).any()


def test_equal_rows_share_their_weight() -> None:
    A = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1], [0, 1]])
    np.testing.assert_allclose(device_weights(A @ A.T), [1 / 4, 1 / 6, 1 / 4, 1 / 6, 1 / 6])


@pytest.mark.parametrize("nonfinite", ["propagate", "drop"])
@pytest.mark.parametrize("rule", ["min_norm", "mean", "inverse_norm"])
@pytest.mark.parametrize(
    "rows",
    [
        [[2, 0], [0, 0], [0, 1]],
        [[0, 0], [0, 0]],
        [[1, 0], [NAN, 0], [0, 1]],
        [[1, 0], [INF, 0], [0, 0], [0, 3]],
        [[NAN, 0], [INF, 0]],
        [[1, 0], [-1, 1e-7]],
        [[1, 0], [-1, 1e-3]],
        [[1, 0], [-1, 1e-9]],
        [[1, 0], [0, 1], [2e6, 1]],
        [[1e-30, 0], [0, 1e30], [-1, 1]],
    ],
    ids=str,
)
def test_which_groups_count(rows: Any, rule: str, nonfinite: str) -> None:
    A = np.array(rows, float)
    with np.errstate(invalid="ignore"):
        G = A @ A.T
    expected = weigh(G, rule, nonfinite=nonfinite)
    on_device = DeviceWeights(torch.from_numpy(G).to(DEVICE), rule, None, nonfinite)
    found = on_device.read()
    np.testing.assert_allclose(found.weights, expected.weights, atol=1e-14)
    assert found.status == expected.status
    assert (found.active, found.dropped) == (expected.active, expected.dropped)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        like = torch.empty(0, dtype=dtype, device=DEVICE)
        for exact in (False, True):
            factors = on_device.factors_for(like, exact=exact).cpu()
            np.testing.assert_allclose(factors, expected.factors(dtype, exact=exact), atol=1e-14)


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from grain_ddp._math import kernel_solver, kernels
i32 = dict.fromkeys(["stride", "n", "columns", "width"], "i32")
tile = dict(N=64, BLOCK=32, SHORT=1024, DOT=True, PRECISION="tf32x3", WIDEN=False)
small = dict(N=8, BLOCK=64, SHORT=4096, DOT=False, PRECISION="ieee", WIDEN=False)
double = dict.fromkeys(["gramian", "limit", "result"], "*fp64")
sources = [
    ASTSource(kernel_solver._weigh, {**double, "n": "i32"},
              constexprs=dict(RULE="min_norm", DROP=True, N=16)),
    *(ASTSource(kernels._weighted_sum, {"rows": "*bf16", "stride": "i32", "weights": "*fp64",
                "out": "*bf16", "columns": "i32", "n": "i32"},
                constexprs=dict(BLOCK=1024, WIDE=wide)) for wide in (False, True)),
]
for dtype, constants in (("fp32", tile), ("bf16", small)):
    sources.append(ASTSource(kernels._gramian, {"rows": "*" + dtype, **i32, "shares": "*fp64"},
                             constexprs=constants))
for source in sources:
    print(len(compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]))
"""


def test_they_compile_without_a_gpu() -> None:
    """To machine code: the interpreter takes much that the compiler does not."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        timeout=240,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert found.returncode == 0, found.stderr
    assert all(int(size) > 1000 for size in found.stdout.split())
    assert len(found.stdout.split()) == 5


# The path of a GPU, taken by tensors of a CPU.


class HostWaits(AssertionError):
    """Where the host would wait for a GPU."""


class NoWaiting(TorchDispatchMode):
    """Operators that make the host wait for a GPU's result raise."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
        ):
            raise HostWaits(str(func))
        return func(*args, **(kwargs or {}))


def refuse(*_: Any) -> Any:
    raise HostWaits("to_host")


def through_ddp(options: dict[str, Any], dtype: torch.dtype, steps: int) -> Any:
    gramian_module.DEVICES.add("cpu")  # in this rank's process
    neighbours_module._SLICE = 1  # to look after the others is no reason to wait either
    to_host = weighting_module.to_host
    model = network(dtype)
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
    state = GrainState(**options)
    ddp.register_comm_hook(state, grain_hook)
    errors, records = [], []
    for step in range(steps):
        ddp.zero_grad()
        value = loss(ddp, step, dtype)
        rows = local_gradients(model, step, dtype)
        weighting_module.to_host = refuse
        # In the first step the ranks compare their options, on the host.
        with NoWaiting() if step else contextlib.nullcontext():
            value.backward()
        weighting_module.to_host = to_host
        found = flat(p.grad for p in model.parameters())
        assert same_everywhere(found)
        assert isinstance(state.last, PendingRecord)
        kept = pickle.loads(pickle.dumps(state.last))
        assert type(kept) is StepRecord
        assert type(state.last) is StepRecord  # it has been read by now
        records.append(kept)
        exact = torch.from_numpy(min_norm_point(rows))
        errors.append((relative_error(found, exact), float((rows @ found.double()).min())))
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert same_everywhere(flat(model.parameters()))
    return errors, records


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/test_cuda.py has it on the GPU")
@pytest.mark.parametrize(("n", "scope"), [(3, "global"), (2, "bucket")])
def test_ddp_through_the_device_path_without_a_wait(n: int, scope: str) -> None:
    errors, records = run(n, through_ddp, {"scope": scope}, torch.float32, 2)[0]
    if scope == "global":
        assert max(error for error, _ in errors) < 1e-5
        assert all(record.weights.shape == (n,) and record.gap < 1e-9 for record in records)
    else:
        assert records[-1].weights.shape == (len(records[-1].gap), n)
        assert len(records[-1].gap) > 1
        assert min(product for _, product in errors) > -1e-6


def dropped(options: dict[str, Any]) -> Any:
    gramian_module.DEVICES.add("cpu")
    rank = dist.get_rank()
    aggregation = Aggregation(GrainState(**options), TorchWire(dist.group.WORLD))
    buffer = torch.randn(20_001, generator=torch.Generator().manual_seed(rank))
    own = buffer.double()
    if rank == 1:
        buffer[5] = NAN
    aggregation.push(buffer)
    record = aggregation.finish()
    assert record is not None
    return buffer, own, record.dropped, record.weights.sum()


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo, with tensors of a CPU")
@pytest.mark.parametrize("wire_dtype", [None, torch.bfloat16], ids=str)
def test_drop_through_the_device_path(wire_dtype: Any) -> None:
    every = run(3, dropped, {"nonfinite": "drop", "wire_dtype": wire_dtype})
    rows = torch.stack([own for rank, (_, own, _, _) in enumerate(every) if rank != 1])
    for found, _, indices, total in every:
        assert indices == (1,)
        assert total == pytest.approx(1)
        error = relative_error(found, torch.from_numpy(min_norm_point(rows)))
        assert error < (1e-5 if wire_dtype is None else 1e-2)


def test_a_record_is_read_once_and_only_when_looked_at() -> None:
    reads = []
    whole = StepRecord(3, np.eye(2), np.full(2, 0.5), 0.0, "fine", (0, 1), ())

    def read() -> StepRecord:
        reads.append(1)
        return whole

    record = PendingRecord(3, read)
    assert isinstance(record, StepRecord)
    assert record.step == 3
    with pytest.raises(AttributeError):
        record.unknown  # noqa: B018
    assert not reads
    assert record.norm_mean == whole.norm_mean
    assert record.status == "fine"
    assert len(reads) == 1
    assert type(record) is StepRecord
