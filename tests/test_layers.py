"""Imports point one way, and what is optional is imported by nobody who does not need it."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import grain_ddp

PACKAGE = Path(grain_ddp.__file__).parent

# A layer may import from those before it. Within one there are no circles, and an integration
# imports no other.
LAYERS = [
    {"_math", "weighting"},
    {"_wire"},
    {"_core", "sinks"},
    {"ddp", "deepspeed", "fsdp", "loop", "mpi", "simulation"},
    {"huggingface", "lightning"},  # make a DDP model
    {"_tools"},
    {"__init__", "__main__"},
]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(module: str) -> set[str]:
    """Everything that a module names in an import, itself or what is in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    names = {name.removeprefix("grain_ddp.") for name in imports(module) if "grain_ddp." in name}
    return names & set(MODULES)


def test_imports_point_one_way() -> None:
    layer = {top: i for i, tops in enumerate(LAYERS) for top in tops}
    assert {module.split(".")[0] for module in MODULES} == set(layer)
    TopologicalSorter({module: ours(module) for module in MODULES}).prepare()  # raises: a circle
    for module in MODULES:
        top = module.split(".")[0]
        for other in ours(module):
            below = other.split(".")[0]
            same = top == below or (layer[top] == layer[below] != layer["ddp"])
            assert same or layer[below] < layer[top], f"{module} imports {other}"


def test_the_wire_and_the_mathematics_meet_in_the_core_only() -> None:
    for module in MODULES:
        if module.startswith("_math"):
            assert not any(name.startswith("torch.distributed") for name in imports(module))
        if module.startswith("_wire"):
            assert not any(name.startswith("_math") for name in ours(module))


@pytest.mark.parametrize("use", ["", "grain_ddp.sinks.jsonl; grain_ddp.fsdp.apply"])
def test_importing_the_package_imports_nothing_optional(use: str) -> None:
    optional = ["deepspeed", "mpi4py", "matplotlib", "sklearn", "scipy", "torch._dynamo"]
    optional += ["tensorboard", "wandb", "triton", "transformers", "accelerate", "lightning"]
    optional += ["mlflow", "opentelemetry"]
    if use:  # what FSDP2 imports itself; Triton up to PyTorch 2.8
        optional = [name for name in optional if name not in ("torch._dynamo", "triton")]
    code = f"import sys, grain_ddp; {use}\nprint([m for m in {optional} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.strip() == "[]"
