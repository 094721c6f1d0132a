"""PyTorch's own DDP tests, which ship in its wheel: with the hook they end as without it.

Those that ask for several GPUs run too, on CPUs, as far as plain DDP passes them there. Too slow
for every run of the tests: pytest finds this file only by its name.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import re
import unittest
from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest
import torch
from differences import PYTORCH
from hooked import SCOPES, hook_every_model, ignore_device_ids
from torch.overrides import TorchFunctionMode
from torch.testing._internal import common_distributed

os.environ.update(BACKEND="gloo", WORLD_SIZE="2")  # read when the tests are imported
common_distributed.TIMEOUT_DEFAULT = 60  # seconds for a test
common_distributed.skip_if_no_gpu = lambda test: test
common_distributed.skip_if_lt_x_gpu = lambda count, **options: lambda test: test
from torch.testing._internal.distributed.distributed_test import (  # noqa: E402
    DistributedTest,
    TestDistBackend,
)

Base = DistributedTest._DistTestBase
SLOW = {"test_ddp_uneven_inputs"}  # takes minutes on CPUs; the other uneven ones do not


class OnCpu(TorchFunctionMode):
    """What the tests put on a GPU, which they name by its number, goes to the CPU."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        if function in (torch.Tensor.to, torch._C._nn._parse_to):  # the latter: Module.to
            args = tuple("cpu" if type(a) is int else a for a in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def without_gpus() -> None:
    """In this process, which has none, tests that ask for GPUs run."""
    ignore_device_ids()
    for name in ("set_device", "synchronize", "manual_seed"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.device_count, torch.cuda.current_device = (lambda: 2), (lambda: 0)
    torch.nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign]
    OnCpu().__enter__()  # until the process ends


class Upstream(TestDistBackend, Base):  # type: ignore[misc]
    """Their test case. Ranks are forked: importing PyTorch in each takes longer than the tests."""

    scope: str | None = None
    """The hook's, or None: plain DDP."""

    __test__ = False  # not collected as it is

    def setUp(self) -> None:
        super().setUp()
        self._start_processes(multiprocessing.get_context("fork").Process)

    @classmethod
    def _run(cls, *arguments: Any, **kwargs: Any) -> None:
        without_gpus()
        if cls.scope:
            hook_every_model(cls.scope)
        try:
            super()._run(*arguments, **kwargs)
        except SystemExit as end:  # at once: gloo's threads sometimes hang in an orderly exit
            os._exit(end.code if isinstance(end.code, int) else bool(end.code))


def uses_ddp(function: Callable[..., Any]) -> bool:
    """Whether a test, or a method of theirs that it calls, names DistributedDataParallel."""
    seen, left = set(), [inspect.unwrap(function).__code__]
    while left:
        code = left.pop()
        seen.add(code)
        if "DistributedDataParallel" in code.co_names:
            return True
        left += [c for c in code.co_consts if isinstance(c, CodeType)]
        helpers = (getattr(Base, name, None) for name in code.co_names)
        codes = (inspect.unwrap(h).__code__ for h in helpers if inspect.isfunction(h))
        left += [c for c in codes if c not in seen]
    return False


TESTS = [name for name in sorted(dir(Base)) if name.startswith("test_")]
NAMES = [name for name in TESTS if uses_ddp(getattr(Base, name)) and name not in SLOW]


def run(name: str, scope: str | None) -> unittest.TestResult:
    Upstream.scope = scope
    result = unittest.TestResult()
    unittest.TestSuite([Upstream(name)]).run(result)
    return result


def error(result: unittest.TestResult) -> str | None:
    return "\n".join(text for _, text in result.failures + result.errors) or None


@pytest.mark.parametrize("name", NAMES)
def test_hooked_as_plain(name: str) -> None:
    plain = run(name, None)
    if plain.skipped:
        pytest.skip(plain.skipped[0][1])
    if error(plain):
        pytest.skip("fails in plain DDP too: " + str(error(plain)).split("distributed_test.py")[-1])
    expected = PYTORCH.get(name)
    for scope in SCOPES:
        found = error(run(name, scope))
        if expected is None:
            assert found is None, f"scope {scope}: {found}"
        else:
            assert found is not None, f"scope {scope}: no longer different; remove it from the list"
            assert re.search(expected.error, found), f"scope {scope}: {found}"


def test_the_list_has_no_others() -> None:
    assert set(PYTORCH) <= set(NAMES)
