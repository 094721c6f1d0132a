"""Imports point one way, and what is optional is imported by nobody who does not need it."""

import ast
import subprocess
import sys
from pathlib import Path

import grain_ddp

PACKAGE = Path(grain_ddp.__file__).parent

# Each module may import from the layers above its own line, and from its own where that is said.
LAYERS = [
    {"solver", "record", "kernels", "kernel_solver", "scratch"},  # mathematics, and memory
    {"gramian"},
    {"weighting"},
    {"neighbours"},  # what moves inside of a host
    {"wire"},  # what moves
    {"state", "groups", "passes"},  # options; what forms a row
    {"aggregation"},  # the only place where both meet
    {"sharded", "packing"},  # the same without its gather; many gradients as few buffers
    {"sinks"},  # where records go
    {"simulation", "ddp", "loop", "deepspeed", "fsdp", "mpi"},  # integrations: none imports another
    {"huggingface", "lightning"},  # frameworks that make a DDP model
    {"report", "doctor", "cost"},
    {"picture"},
    {"plan"},
    {"bench"},  # measures what the plan reads
    {"__init__"},
    {"__main__"},
]
MATHEMATICS = {"solver", "record", "kernels", "kernel_solver", "gramian", "weighting"}
# May name torch.distributed.
DISTRIBUTED = {"wire", "state", "ddp", "loop", "deepspeed", "fsdp", "mpi", "sinks"}
DISTRIBUTED |= {"doctor", "bench"}


def imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_layer() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == set().union(*LAYERS)


def test_imports_point_one_way() -> None:
    above: set[str] = set()
    for layer in LAYERS:
        for module in layer:
            ours = {name.split(".")[1] for name in imports(module) if name.startswith("grain_ddp.")}
            ours &= set().union(*LAYERS)
            assert ours <= above, f"{module} imports {ours - above}"
        above |= layer


def test_the_wire_and_the_mathematics_meet_in_the_aggregation_only() -> None:
    assert not any("grain_ddp" in name for name in imports("neighbours"))
    ours = {name for name in imports("wire") if "grain_ddp" in name}
    assert all(name.startswith("grain_ddp.neighbours") for name in ours)
    for module in MATHEMATICS:
        names = imports(module)
        assert not any(name.startswith(("torch.distributed", "grain_ddp.wire")) for name in names)
    for module in set().union(*LAYERS) - DISTRIBUTED - {"__init__"}:
        assert "torch.distributed" not in imports(module)


def test_importing_the_package_imports_nothing_optional() -> None:
    optional = ["deepspeed", "mpi4py", "matplotlib", "sklearn", "scipy", "torch._dynamo"]
    optional += ["tensorboard", "wandb", "triton", "transformers", "accelerate", "lightning"]
    code = f"import sys, grain_ddp; print([m for m in {optional} if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert out.stdout.strip() == "[]"
