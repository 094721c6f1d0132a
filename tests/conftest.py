"""Every test starts from the same random state, on one thread, as ranks do."""

import os

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is imported


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
