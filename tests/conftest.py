"""Every test starts from the same random state, on one thread, as ranks do."""

import os
from collections.abc import Callable

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is imported


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str]) -> Callable[[list[str], int, str], None]:
    """Check that `grain-ddp` with these arguments ends with a status and says why in a sentence."""

    from grain_ddp.__main__ import main  # after the setting above

    def check(arguments: list[str], status: int, expected: str) -> None:
        try:
            found: object = main(arguments)
        except SystemExit as end:
            found = end.code
        assert found == status
        err = capsys.readouterr().err
        assert expected in err
        assert "Traceback" not in err

    return check
