"""What serves an engine, and is the one owner of its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from grain_ddp._core.aggregation import Aggregation
from grain_ddp._core.sharded import ShardedAggregation
from grain_ddp._core.state import GrainState
from grain_ddp._wire.torch_wire import TorchWire

A = TypeVar("A", Aggregation, ShardedAggregation)


class Owner(ABC, Generic[A]):
    """An engine's aggregation, agreed on by its ranks, and anew when the state loads options.

    `fixed` are the options that DeepSpeed was set up for: the others may be loaded later.
    """

    gone = False
    fixed: tuple[str, ...]

    def __init__(self, engine: Any, state: GrainState, wire: TorchWire) -> None:
        self.engine, self.state, self.wire = engine, state, wire
        self._set_up = {name: getattr(state, name) for name in self.fixed}
        self._aggregation: A = self.bind()

    def __str__(self) -> str:
        return f"the DeepSpeed engine of {type(self.engine.module).__name__}"

    @abstractmethod
    def bind(self) -> A:
        """Agree with the other ranks on the state's options."""

    def replica(self) -> list[tuple[str, Tensor]]:
        """What every rank holds the same of, by name: at stage 3 no parameter is whole."""
        module: nn.Module = self.engine.module
        whole: bool = self.engine.zero_optimization_stage() < 3
        return [*(module.named_parameters() if whole else ()), *module.named_buffers()]

    @property
    def aggregation(self) -> A:
        if self.state.owner is not self:  # it has loaded other options
            for name, value in self._set_up.items():
                if getattr(self.state, name) != value:
                    raise ValueError(
                        f"grain_ddp: grain.{name} was {value!r} when the engine was made, and the "
                        f"state has loaded {getattr(self.state, name)!r}. Make another engine."
                    )
            self._aggregation = self.bind()
        return self._aggregation
