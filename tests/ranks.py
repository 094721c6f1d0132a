"""What the ranks of the multi-process tests share: small models, data, and gathered gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

SIZES = [1, 2, 3, 4, 5, 8]


def gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Every rank's tensor, in rank order."""
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, tensor.contiguous(), group=group)
    return every


def flat(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors if t is not None])


def same_everywhere(tensor: Tensor) -> bool:
    """Bit by bit, NaN included."""
    raw = tensor.detach().contiguous().view(torch.uint8)
    return all(torch.equal(raw, other) for other in gather(raw))


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """3 layers, 6 parameters, lengths that few world sizes divide; the same on every rank."""
    torch.manual_seed(0)
    layers = nn.Linear(11, 47), nn.Tanh(), nn.Linear(47, 29), nn.Tanh(), nn.Linear(29, 3)
    return nn.Sequential(*layers).to(dtype)


def batch(
    step: int, dtype: torch.dtype = torch.float32, rank: int | None = None
) -> tuple[Tensor, Tensor]:
    """Another one for each rank and step."""
    rank = dist.get_rank() if rank is None else rank
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(6, 11, generator=generator).to(dtype)
    return x, torch.randint(0, 3, (6,), generator=generator)


def loss(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x, y = batch(step, dtype)
    return nn.functional.cross_entropy(model(x).float(), y)


def local_gradients(model: nn.Module, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every rank's own gradient at the model's parameters, as rows [n, d] in float64."""
    twin = network(dtype)
    twin.load_state_dict(model.state_dict())
    loss(twin, step, dtype).backward()
    return torch.stack(gather(flat(p.grad for p in twin.parameters()).double()))


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-300))
