"""Many gradients as few buffers, and back."""

import torch

from grain_ddp._core.packing import flatten, packs


def test_packs_hold_neighbours_of_one_dtype_up_to_the_limit() -> None:
    sizes = [(3, torch.float32), (2, torch.float32), (9, torch.float32), (1, torch.float32)]
    sizes += [(4, torch.bfloat16), (1, torch.float32)]
    gradients = [torch.zeros(size, dtype=dtype) for size, dtype in sizes]
    found = [[g.numel() for g in pack] for pack in packs(gradients, 20)]
    assert found == [[3, 2], [9], [1], [4], [1]]
    assert list(packs([], 20)) == []


def test_values_come_back() -> None:
    pack = [torch.zeros(2, 3).t(), torch.zeros(4), torch.zeros(())]
    flat, copy_back = flatten(pack)
    flat.copy_(torch.arange(11.0))
    copy_back()
    assert pack[0].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert pack[1].tolist() == [6, 7, 8, 9]
    assert float(pack[2]) == 10


def test_one_that_is_by_itself_is_not_copied() -> None:
    gradient = torch.zeros(2, 3)
    flat, copy_back = flatten([gradient])
    flat += 1
    copy_back()
    assert gradient.tolist() == [[1] * 3] * 2
    transposed = torch.zeros(2, 3).t()
    flat, copy_back = flatten([transposed])
    flat += 1
    assert transposed.sum() == 0
    copy_back()
    assert transposed.sum() == 6
