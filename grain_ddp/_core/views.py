"""Views of several tensors that are read and written as if they were one, flat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Views = Sequence[Tensor]


def part(views: Views, start: int, stop: int) -> list[Tensor]:
    """The elements from start to stop of the views, as views."""
    found, offset = [], 0
    for view in views:
        low, high = max(start - offset, 0), min(stop - offset, len(view))
        if low < high:
            found.append(view[low:high])
        offset += len(view)
    return found


def length(views: Views) -> int:
    return sum(map(len, views))


def read(views: Views, like: Tensor) -> Tensor:
    """The views as one contiguous tensor: a copy if they are several, or of another dtype."""
    if len(views) == 1:
        return views[0].to(like.dtype)
    return torch.cat([view.to(like.dtype) for view in views]) if views else like.new_empty(0)


def write(views: Views, values: Tensor) -> None:
    """Copy the first values into the views."""
    offset = 0
    for view in views:
        view.copy_(values[offset : offset + len(view)])
        offset += len(view)


def matrix(slots: Sequence[Views]) -> Tensor | None:
    """The slots as one matrix [n, c], where they lie so: equally long, and equally far apart."""
    if len(slots) < 2 or any(len(views) != 1 for views in slots):
        return None
    views = [one for (one,) in slots]
    first, step = views[0], views[1].data_ptr() - views[0].data_ptr()
    whole, odd = divmod(step, first.itemsize)
    if odd or whole < len(first) or any(len(view) != len(first) for view in views):
        return None
    pointers = [first.data_ptr() + step * i for i in range(len(views))]
    memory = first.untyped_storage().data_ptr()
    if [view.data_ptr() for view in views] != pointers or any(
        view.untyped_storage().data_ptr() != memory for view in views
    ):
        return None
    return first.as_strided((len(views), len(first)), (whole, 1))
