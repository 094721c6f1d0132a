"""DeepSpeed engines for the tests, and what they should come to by a reference of its own."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
from oracle import min_norm_point
from ranks import flat, gather, loss, network

import grain_ddp.deepspeed  # noqa: F401  makes DeepSpeed look at the "grain" section

# DeepSpeed would compile an operation of its own at the first use, which only inference needs.
# (By name: as an attribute, deepspeed.comm.torch is PyTorch.)
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None

# On a CPU, older ones are sometimes wrong at stage 3, and reduce nothing if contiguous_gradients is
# false.
RIGHT = tuple(map(int, deepspeed.__version__.split(".")[:3])) >= (0, 19, 8)
STAGES = [0, 1, 2, 3] if RIGHT else [0, 1, 2]
RATE, MOMENTUM = 0.5, 0.9
Rule = Callable[[torch.Tensor], torch.Tensor]


def min_norm(rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(min_norm_point(rows))


def mean(rows: torch.Tensor) -> torch.Tensor:
    return rows.mean(0)


def config(stage: int, grain: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 1_000_000, **more.pop("zero", {})}
    result = {
        "train_micro_batch_size_per_gpu": 6,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **more,
    }
    if grain is not None:
        result["grain"] = {"enabled": True, **grain}
    return result


def engine_for(settings: dict[str, Any], model: torch.nn.Module | None = None) -> Any:
    model = network() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, config=copy.deepcopy(settings), dist_init_required=False
    )[0]


def train(engine: Any, steps: int, first: int = 0, dtype: torch.dtype = torch.float32) -> None:
    passes = engine.gradient_accumulation_steps()
    for step in range(first, first + steps):
        for k in range(passes):
            engine.backward(loss(engine, step * passes + k, dtype))
            engine.step()


def masters(engine: Any) -> torch.Tensor:
    """The parameters in fp32, as the optimizer keeps them."""
    return flat(deepspeed.utils.safe_get_full_fp32_param(p) for p in engine.module.parameters())


def parameters(engine: Any) -> torch.Tensor:
    every = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(every):
        return flat(every).clone()


def reference(
    steps: int, passes: int, rule: Rule, each_pass: bool, clip: float = 0.0
) -> torch.Tensor:
    """What the parameters should be, from gathered gradients, with none of the package."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    for step in range(steps):
        rows = []
        for k in range(passes):
            model.zero_grad()
            (loss(model, step * passes + k) / passes).backward()
            own = flat(p.grad for p in model.parameters()).double()
            rows.append(torch.stack(gather(own)))
        total = sum(map(rule, rows)) if each_pass else rule(sum(rows))
        if clip:
            total = total * min(1.0, clip / (float(total.norm()) + 1e-6))
        for p, part in zip(
            model.parameters(), total.split([p.numel() for p in model.parameters()]), strict=True
        ):
            p.grad = part.view_as(p).float()
        optimizer.step()
    return flat(model.parameters())
