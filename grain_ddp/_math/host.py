"""Small tensors between a GPU and the host, which waits for nothing that it need not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device; the host does not wait."""
    if device.type == "cuda":  # a copy from pageable memory would wait
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def to_host(tensor: Tensor, ready: torch.cuda.Event | None = None) -> Tensor:
    """The tensor on the CPU. On a GPU the host waits for `ready`, or for the current stream so far.

    A stream of its own, so that what is queued later is not waited for.
    """
    if tensor.device.type != "cuda":
        return tensor
    ready = ready or torch.cuda.current_stream(tensor.device).record_event()
    stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        stream.record_event().synchronize()
    return host


class Later:
    """A tensor on its way to the host, read when it is there."""

    def __init__(self, values: Tensor) -> None:
        self._values, self._event = values, None
        if values.device.type == "cuda":
            self._values = torch.empty_like(values, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.current_stream(values.device).record_event()

    @property
    def ready(self) -> bool:
        """Whether reading it waits for nothing."""
        return self._event is None or bool(self._event.query())

    def read(self) -> Tensor:
        """The tensor on the host: waits for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
