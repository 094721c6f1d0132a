"""What this machine and installation support: `grain-ddp doctor`."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import grain_ddp
from grain_ddp._core.state import GrainState
from grain_ddp._math.solver import min_norm
from grain_ddp.ddp import grain_hook

EXTRAS = {  # distribution: what it is for
    "matplotlib": "pictures of the tools: pip install 'grain-ddp[plot]'",
    "tensorboard": "the TensorBoard sink: pip install 'grain-ddp[tensorboard]'",
    "mlflow-skinny": "the MLflow sink: pip install 'grain-ddp[mlflow]'",
    "opentelemetry-api": "the OpenTelemetry sink: pip install 'grain-ddp[opentelemetry]'",
    "mpi4py": "gradients over MPI: pip install 'grain-ddp[mpi]'",
    "wandb": "the Weights & Biases sink: pip install 'grain-ddp[wandb]'",
}
VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
    *("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "CUDA_VISIBLE_DEVICES"),
)
_BACKENDS = {  # name: whether this PyTorch was built with it
    "gloo": dist.is_gloo_available,
    "nccl": dist.is_nccl_available,
    "mpi": dist.is_mpi_available,
    "ucc": dist.is_ucc_available,
}


def examine(timeout: float) -> bool:
    """Print what is here and what works. Whether all tests that can run here passed.

    Args:
        timeout: seconds that each test may take.
    """
    _show("grain_ddp", grain_ddp.__version__)
    _show("Python", f"{platform.python_version()}, {platform.platform()}")
    _show("torch", torch.__version__)
    _show("numpy", _version("numpy") or "not installed")
    for name, purpose in EXTRAS.items():
        _show(name, _version(name) or f"not installed (for {purpose})")
    _show("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads per process")
    gpus = torch.cuda.device_count()
    _show("GPUs", ", ".join(torch.cuda.get_device_name(i) for i in range(gpus)) or "none")
    available = [name for name, built in _BACKENDS.items() if built()]
    _show("backends", f"{', '.join(available)} (in this PyTorch)")
    _show("host", _host())
    found = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    _show("environment", " ".join(found) or "none of the variables of a launcher or a network")
    print()

    passed = True
    for backend, needed in (("gloo", 0), ("nccl", 2)):
        what = f"2 ranks, {backend}"
        if backend not in available:
            _show(what, f"not tested: this PyTorch has no {backend}")
        elif gpus < needed:
            _show(what, f"not tested: needs {needed} GPUs, but there are {gpus}")
        else:
            start = time.monotonic()
            succeeded, said = _two_ranks(backend, timeout)
            passed = passed and succeeded
            _show(what, said + f", in {time.monotonic() - start:.1f} s" * succeeded)
    print(
        "\nEverything that can be tested here works."
        if passed
        else "\nA test failed. If the message is about an address, a device or a connection, set "
        "GLOO_SOCKET_IFNAME\n(or NCCL_SOCKET_IFNAME) to an interface that is up, from `ip link`, "
        "or unset it. See also the\ndocumentation's page on troubleshooting."
    )
    return passed


def _show(name: str, value: str) -> None:
    print(f"{name + ':':18}{value}", flush=True)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _host() -> str:
    name = socket.gethostname()
    try:
        return f"{name}, at {socket.gethostbyname(name)}"
    except OSError:
        return (
            f"{name}, which has no address: gloo and NCCL may not find their network. Enter it in "
            "/etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to an interface"
        )


def _two_ranks(backend: str, timeout: float) -> tuple[bool, str]:
    """Train a small model on two processes. Whether it went well, and what to tell the user."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "grain_ddp._tools.doctor", backend, folder, str(timeout)]
        # Where this copy of the package is, installed or not; and what was relative to the current
        # folder, where a random.py may be, which is not that of Python and not ours to import.
        given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        path = os.pathsep.join([str(Path(__file__).parents[2]), *map(os.path.abspath, given)])
        ranks = []
        for rank in range(2):
            with open(Path(folder, f"said{rank}"), "wb") as said:
                ranks.append(
                    subprocess.Popen(
                        [*command, str(rank)],
                        env={**os.environ, "PYTHONPATH": path},
                        cwd=folder,
                        stdout=said,
                        stderr=said,
                    )
                )
        until = time.monotonic() + timeout
        try:
            for process in ranks:
                process.wait(max(until - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        for rank, process in enumerate(ranks):
            said_lines = (
                Path(folder, f"said{rank}").read_text(errors="replace").strip().splitlines()
            )
            if process.returncode == -9:
                continue  # it waited for the other one, or both hung
            if process.returncode:
                last = said_lines[-1] if said_lines else "no message"
                return False, f"FAILED on rank {rank}: {last}"
        if any(process.returncode for process in ranks):
            return False, (
                f"FAILED: no answer within {timeout:g} s. On a busy machine allow more with "
                "--timeout; else the ranks could not reach each other"
            )
        way = Path(folder, "way")
        return True, "passed" + (way.read_text() if way.exists() else "")


def _rank(backend: str, folder: str, timeout: float, rank: int) -> None:
    """One of the two ranks: both options against the gradients themselves."""
    from datetime import timedelta

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    store = dist.FileStore(str(Path(folder, "store")), 2)  # type: ignore[attr-defined, unused-ignore]
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=timeout)
    )
    for weighting in ("mean", "min_norm"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 3)).to(device)
        batches = torch.randn(2, 8, 40, device=device)
        rows = []  # each rank's gradient, computed here
        for batch in batches:
            net.zero_grad()
            net(batch).square().mean().backward()
            rows.append(
                torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
            )
        matrix = torch.stack(rows).double()
        weights = min_norm(matrix @ matrix.T).weights
        expected = (matrix.mean(0) if weighting == "mean" else weights @ matrix).cpu()
        net.zero_grad()
        model = DistributedDataParallel(net)
        state = GrainState(weighting=weighting)
        model.register_comm_hook(state, grain_hook)
        model(batches[rank]).square().mean().backward()
        found = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).cpu()
        error = float((found.double() - expected).norm() / expected.norm())
        if not error < 1e-5:
            raise AssertionError(f"weighting={weighting!r} is off by {error:.1e}, expected < 1e-5")
    if backend == "gloo":
        near = state.owner.aggregation.wire.shares_memory(device)
        way = "each reads the other's memory" if near else "over the network"
        Path(folder, "way").write_text(f": {way}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
