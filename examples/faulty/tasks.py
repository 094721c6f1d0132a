"""Small trainings with n simulated workers, each with a habit that a detector may trip over."""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass
class Task:
    """A model, its data, and how it is trained. `batch(step, rank)` is the same in every run."""

    model: nn.Module
    batch: Callable[[int, int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    rate: Callable[[int], float]

    def gradients(self, batch: Batch) -> list[Tensor]:
        """Of the parameters, for one worker's batch."""
        loss = self.loss(self.model(batch[0]), batch[1])
        return list(torch.autograd.grad(loss, list(self.model.parameters())))

    def update(self, step: int, gradients: list[Tensor]) -> None:
        for p, gradient in zip(self.model.parameters(), gradients, strict=True):
            p.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number + 1
    return torch.Generator().manual_seed(seed % 2**62)


class Block(nn.Module):
    """Causal attention and a perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(-2, -3).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Characters(nn.Module):
    """A transformer that predicts the next character."""

    def __init__(self, vocabulary: int, width: int = 64, length: int = 32) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(self.characters(x) + self.places)
        result: Tensor = self.head(self.norm(hidden)).flatten(0, 1)
        return result


def characters(seed: int, samples: int = 4) -> Task:
    """A transformer of 110 thousand parameters on the source of a module; warm-up, then cosine."""
    text = inspect.getsource(argparse).encode("ascii", "ignore")
    known = {character: k for k, character in enumerate(sorted(set(text)))}
    data = torch.tensor([known[character] for character in text])
    torch.manual_seed(seed)
    model = Characters(len(known))

    def batch(step: int, rank: int) -> Batch:
        starts = torch.randint(len(data) - 33, (samples,), generator=_generator(seed, step, rank))
        windows = torch.stack([data[start : start + 33] for start in starts])
        return windows[:, :-1], windows[:, 1:].flatten()

    def rate(step: int) -> float:
        return 1e-3 * min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / 4000))

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Task(model, batch, nn.functional.cross_entropy, optimizer, rate)


def perceptron(seed: int) -> Task:
    """Ten noisy classes; the rate falls by steps."""
    centres = 1.5 * torch.randn(10, 64, generator=_generator(seed))
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10)
    )

    def batch(step: int, rank: int) -> Batch:
        generator = _generator(seed, step, rank)
        y = torch.randint(10, (32,), generator=generator)
        return centres[y] + 3 * torch.randn(32, 64, generator=generator), y

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rates = (0.05, 0.01, 0.002)
    return Task(
        model, batch, nn.functional.cross_entropy, optimizer, lambda step: rates[step // 1500 % 3]
    )


class Bag(nn.Module):
    """Words to a class, by their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.top = nn.Embedding(2000, 32), nn.Linear(32, 8)
        self.hidden = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.top(torch.relu(self.hidden(self.words(x).mean(1))))
        return result


def rare(seed: int) -> Task:
    """Bags of words whose frequencies fall as 1/rank: most of them come seldom."""
    chances = 1 / torch.arange(1, 2001.0)
    classes = torch.randint(8, (2000,), generator=_generator(seed))
    torch.manual_seed(seed)
    model = Bag()

    def batch(step: int, rank: int) -> Batch:
        generator = _generator(seed, step, rank)
        x = torch.multinomial(chances, 16 * 12, True, generator=generator).view(16, 12)
        return x, classes[x].mode(1).values

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    return Task(model, batch, nn.functional.cross_entropy, optimizer, lambda step: 2e-3)


def tailed(seed: int) -> Task:
    """Regression whose noise has Student's t with 2.5 degrees of freedom: outliers."""
    torch.manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 1)).requires_grad_(False)
    model = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh())
    model.append(nn.Linear(48, 1))

    def batch(step: int, rank: int) -> Batch:
        generator = _generator(seed, step, rank)
        x = torch.randn(32, 24, generator=generator)
        normal = torch.randn(32, 6, generator=generator)
        noise = normal[:, 0] / normal[:, 1:].square().mean(1).pow(1.25).clamp_min(1e-3).sqrt()
        return x, teacher(x).squeeze(1) + 0.3 * noise

    def loss(found: Tensor, expected: Tensor) -> Tensor:
        return nn.functional.mse_loss(found.squeeze(1), expected)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return Task(model, batch, loss, optimizer, lambda step: 0.01)


def spiking(seed: int) -> Task:
    """Small images; every 500 steps the rate is far too large for a moment: the loss spikes."""
    shapes = torch.randn(10, 1, 8, 8, generator=_generator(seed))
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 10),
    )

    def batch(step: int, rank: int) -> Batch:
        generator = _generator(seed, step, rank)
        y = torch.randint(10, (16,), generator=generator)
        return shapes[y] + 1.5 * torch.randn(16, 1, 8, 8, generator=generator), y

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Task(
        model,
        batch,
        nn.functional.cross_entropy,
        optimizer,
        lambda step: 0.1 if step % 500 == 499 else 2e-3,
    )


TASKS: dict[str, Callable[[int], Task]] = {
    "characters": characters,
    "perceptron": perceptron,
    "rare words": rare,
    "long tails": tailed,
    "spikes": spiking,
}
