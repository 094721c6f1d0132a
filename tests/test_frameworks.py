"""Trainer, Accelerate and Lightning: their batches, accumulation and scaling, our aggregate."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import launch, run
from oracle import min_norm_point
from ranks import flat, gather, network, relative_error, same_everywhere
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from grain_ddp import GrainState, grain_hook

RATE, STEPS, SIZE = 0.5, 3, 2
Rule = Callable[[torch.Tensor], torch.Tensor]


def min_norm(rows: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(min_norm_point(rows))


def reference(
    model: nn.Module, steps: list[list[Any]], loss: Callable[..., Any], **how: Any
) -> Any:
    """The model's parameters after SGD on these batches, by gathered gradients and the oracle.

    ``steps[s][k]`` is the batch of this rank's pass k; ``loss(model, batch, passes)`` what a pass
    adds. With `each_pass` every pass is aggregated by itself.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for passes in steps:
        rows = []
        for batch in passes:
            model.zero_grad()
            loss(model, batch, len(passes)).backward()
            rows.append(torch.stack(gather(flat(p.grad for p in trained).double())))
        total = sum(map(min_norm, rows)) if how.get("each_pass") else min_norm(sum(rows))
        with torch.no_grad():
            for p, part in zip(trained, total.split([p.numel() for p in trained]), strict=True):
                p -= RATE * part.view_as(p).float()
    return flat(trained)


def like_torchrun() -> None:
    """What a launcher sets beside the harness's variables."""
    n = os.environ["WORLD_SIZE"]
    os.environ.update(LOCAL_WORLD_SIZE=n, GROUP_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT="29500", TORCHELASTIC_RUN_ID="test", HF_HUB_OFFLINE="1")
    warnings.simplefilter("ignore")


def deepspeed_config(stage: int, grain: dict[str, Any] | None, passes: int) -> dict[str, Any]:
    pytest.importorskip("deepspeed")
    import grain_ddp.deepspeed  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    config: dict[str, Any] = {
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1_000_000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": SIZE,
        "gradient_accumulation_steps": passes,
    }
    return config if grain is None else {**config, "grain": {"enabled": True, **grain}}


# Hugging Face's Trainer


def language_model(lora: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **off, bos_token_id=0, eos_token_id=0))
    if lora:
        from peft import LoraConfig, get_peft_model

        options = {"r": 4, "lora_dropout": 0.0, "init_lora_weights": False}  # else a factor is 0
        model = get_peft_model(model, LoraConfig(target_modules=["c_attn"], **options))
    return model


def sentences() -> list[dict[str, torch.Tensor]]:
    """Of different lengths, so that the ranks have different numbers of tokens."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(64):
        tokens = torch.randint(0, 61, (12,), generator=generator)
        length = int(torch.randint(3, 13, (), generator=generator))
        labels = torch.where(torch.arange(12) < length, tokens, -100)
        found.append({"input_ids": tokens, "labels": labels})
    return found


def trainer_run(callbacks: list[Any], passes: int, lora: bool, **options: Any) -> Any:
    """The Trainer after some steps; and the batches it saw, with its own count of tokens."""
    from transformers import Trainer, TrainingArguments

    seen: list[tuple[dict[str, torch.Tensor], Any]] = []

    class Recording(Trainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, items: Any = None) -> Any:
            seen.append(({k: v.clone() for k, v in inputs.items()}, items))
            return super().training_step(model, inputs, items)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Recording(
            model=language_model(lora),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=SIZE,
                gradient_accumulation_steps=passes,
                max_steps=STEPS,
                optim="sgd",
                learning_rate=RATE,
                lr_scheduler_type="constant",
                max_grad_norm=0,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                **options,
            ),
            train_dataset=sentences(),
            callbacks=callbacks,
        )
        trainer.train()
    return trainer, [seen[i : i + passes] for i in range(0, len(seen), passes)]


def trained(model: nn.Module) -> torch.Tensor:
    return flat(p for p in model.parameters() if p.requires_grad)


def trainer_loss(across: bool) -> Callable[..., torch.Tensor]:
    """The Trainer divides by the tokens of all ranks and multiplies by their number; or, without
    `average_tokens_across_devices`, divides by this rank's tokens."""

    def loss(model: nn.Module, batch: Any, passes: int) -> torch.Tensor:
        inputs, items = batch
        n = int(os.environ["WORLD_SIZE"]) if across else 1
        return model(**inputs, num_items_in_batch=items).loss * n

    return loss


def trainer_ddp(passes: int, lora: bool, across: bool) -> dict[str, Any]:
    pytest.importorskip("transformers")
    like_torchrun()
    from grain_ddp.huggingface import GrainCallback

    options = {"average_tokens_across_devices": across}
    state = GrainState()
    trainer, steps = trainer_run([GrainCallback(state)], passes, lora, **options)
    found = trained(trainer.model)
    mean, _ = trainer_run([GrainCallback(GrainState(weighting="mean"))], passes, lora, **options)
    plain, plain_steps = trainer_run([], passes, lora, **options)
    assert torch.equal(plain_steps[0][0][0]["input_ids"], steps[0][0][0]["input_ids"])
    assert same_everywhere(found)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "reference": relative_error(
            found, reference(language_model(lora), steps, trainer_loss(across))
        ),
        "mean": relative_error(trained(mean.model), trained(plain.model)),
        "distance": relative_error(found, trained(plain.model)),
        "steps": state.step,
        "batches": steps[0][0][0]["input_ids"].tolist(),
        "logged": [entry["grain/conflicts_aggregate"] for entry in logs],
    }


@pytest.mark.parametrize(
    ("n", "passes", "lora", "across"),
    [(2, 1, False, True), (3, 2, False, True), (3, 2, False, False), (2, 2, True, True)],
)
def test_trainer(n: int, passes: int, lora: bool, across: bool) -> None:
    pytest.importorskip("transformers")
    if lora:
        pytest.importorskip("peft")
    found = run(n, trainer_ddp, passes, lora, across, deadline=150)
    for one in found:
        assert one["reference"] < 1e-5
        assert one["mean"] < 1e-6
        assert one["distance"] > 1e-4  # else nothing here would tell GRAIN from the mean
        assert one["steps"] == STEPS
        assert one["logged"] == [0.0] * STEPS
    assert found[0]["batches"] != found[1]["batches"]


def trainer_deepspeed(stage: int, passes: int) -> tuple[float, float]:
    like_torchrun()

    def train(grain: dict[str, Any] | None) -> Any:
        return trainer_run([], passes, False, deepspeed=deepspeed_config(stage, grain, passes))

    trainer, steps = train({})
    assert trainer.model_wrapped.grain.step == STEPS
    each = trainer.model_wrapped.grain.scope == "bucket"
    expected = reference(language_model(False), steps, trainer_loss(True), each_pass=each)
    mean, _ = train({"weighting": "mean"})
    plain, _ = train(None)
    assert plain.model_wrapped.grain is None
    return (
        relative_error(trained(trainer.model), expected),
        relative_error(trained(mean.model), trained(plain.model)),
    )


@pytest.mark.parametrize(("n", "stage", "passes"), [(2, 2, 2), (3, 1, 2)])
def test_trainer_with_deepspeed(n: int, stage: int, passes: int) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("deepspeed")
    for error, mean in run(n, trainer_deepspeed, stage, passes, deadline=150):
        assert error < 1e-5
        assert mean < 1e-6


def trainer_resumes() -> tuple[int, int]:
    """Steps of a state that serves a Trainer that starts at a later step; and of a second run."""
    like_torchrun()
    from transformers import TrainerCallback

    from grain_ddp.huggingface import GrainCallback

    class Later(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            state.global_step = 1

    state = GrainState()
    trainer, _ = trainer_run([Later(), GrainCallback(state)], 1, False)
    once = state.step
    trainer.train()  # the hook is there already
    return once, state.step


def test_trainer_goes_on_counting() -> None:
    pytest.importorskip("transformers")
    assert run(2, trainer_resumes, deadline=120) == [(STEPS, STEPS)] * 2


def callback_without_ddp() -> None:
    like_torchrun()
    from grain_ddp.huggingface import GrainCallback

    trainer_run([GrainCallback(GrainState())], 1, False, deepspeed=deepspeed_config(2, {}, 1))


def test_trainer_with_deepspeed_needs_no_callback() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("deepspeed")
    for outcome in launch(2, callback_without_ddp, timeout=20):
        assert outcome.error is not None
        assert "expected a model that DistributedDataParallel wraps" in outcome.error


def test_one_process() -> None:
    pytest.importorskip("transformers")
    from grain_ddp.huggingface import GrainCallback

    callback, begin = GrainCallback(GrainState()), SimpleNamespace(global_step=0)
    with pytest.warns(UserWarning, match="the world has one rank"):
        callback.on_train_begin(SimpleNamespace(n_gpu=1), begin, None, model=network())
    with pytest.raises(ValueError, match="DataParallel averages"):
        callback.on_train_begin(SimpleNamespace(n_gpu=2), begin, None, model=network())


# Accelerate and Lightning


class Points(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __len__(self) -> int:
        return 96

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(11, generator=generator)
        return x, torch.randint(0, 3, (), generator=generator)


def points_loss(model: nn.Module, batch: Any, passes: int) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) / passes


def accelerate_run(passes: int, prepare: Callable[[Any], Any], **options: Any) -> Any:
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)  # Accelerator(cpu=True) would ignore a deepspeed_plugin
    accelerator = Accelerator(gradient_accumulation_steps=passes, **options)
    net = network()
    loader = torch.utils.data.DataLoader(Points(), batch_size=SIZE)
    model, optimizer, loader = accelerator.prepare(
        net, torch.optim.SGD(net.parameters(), lr=RATE), loader
    )
    prepare(model)
    seen: list[Any] = []
    for batch in loader:
        if len(seen) == passes * STEPS:
            break
        seen.append(batch)
        with accelerator.accumulate(model):
            accelerator.backward(points_loss(model, batch, 1))
            optimizer.step()
            optimizer.zero_grad()
    return (
        model,
        flat(net.parameters()),
        [seen[i : i + passes] for i in range(0, len(seen), passes)],
    )


def accelerate_ddp(passes: int) -> tuple[float, float, int]:
    like_torchrun()
    state = GrainState()

    def hook(state: GrainState) -> Callable[[Any], Any]:
        return lambda model: model.register_comm_hook(state, grain_hook)

    _, found, steps = accelerate_run(passes, hook(state))
    expected = reference(network(), steps, points_loss)
    _, mean, _ = accelerate_run(passes, hook(GrainState(weighting="mean")))
    _, plain, _ = accelerate_run(passes, lambda model: None)
    assert relative_error(found, plain) > 1e-3
    return relative_error(found, expected), relative_error(mean, plain), state.step


@pytest.mark.parametrize(("n", "passes"), [(2, 1), (3, 2), (4, 1)])
def test_accelerate(n: int, passes: int) -> None:
    pytest.importorskip("accelerate")
    for error, mean, steps in run(n, accelerate_ddp, passes):
        assert error < 1e-5
        assert mean < 1e-6
        assert steps == STEPS


def accelerate_deepspeed(stage: int, passes: int) -> tuple[float, float]:
    like_torchrun()
    from accelerate import DeepSpeedPlugin

    def train(grain: dict[str, Any] | None) -> Any:
        config = deepspeed_config(stage, grain, passes)
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        return accelerate_run(passes, lambda model: None, deepspeed_plugin=plugin)

    engine, found, steps = train({"scope": "global"})
    assert engine.grain.step == STEPS
    expected = reference(network(), steps, points_loss)
    return relative_error(found, expected), relative_error(
        train({"weighting": "mean"})[1], train(None)[1]
    )


def test_accelerate_with_deepspeed() -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("deepspeed")
    for error, mean in run(3, accelerate_deepspeed, 2, 2):
        assert error < 1e-5
        assert mean < 1e-6


def lightning_run(passes: int, callbacks: list[Any], **ddp: Any) -> Any:
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy

    seen: list[Any] = []
    hooks: list[int] = []

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            seen.append(batch)
            return points_loss(self.net, batch, 1)

        def on_train_epoch_end(self) -> None:
            hooks.append(len(self.trainer.model._comm_hooks))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=RATE)

    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=DDPStrategy(**ddp),
        max_steps=STEPS,
        accumulate_grad_batches=passes,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(Points(), batch_size=SIZE))
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    steps = [seen[i : i + passes] for i in range(0, len(seen), passes)]
    return flat(module.net.parameters()), steps, hooks, logged


def lightning_ddp(passes: int) -> tuple[float, float, list[int], dict[str, float], int]:
    like_torchrun()
    from grain_ddp.lightning import GrainCallback

    state = GrainState()
    both = {"ddp_comm_state": state, "ddp_comm_hook": grain_hook}
    found, steps, hooks, logged = lightning_run(passes, [GrainCallback(state)], **both)
    expected = reference(network(), steps, points_loss)
    mean, *_ = lightning_run(passes, [GrainCallback(GrainState(weighting="mean"))])
    plain, *_ = lightning_run(passes, [])
    assert relative_error(found, plain) > 1e-3
    errors = relative_error(found, expected), relative_error(mean, plain)
    return *errors, hooks, logged, state.step


@pytest.mark.parametrize(("n", "passes"), [(2, 1), (3, 2)])
def test_lightning(n: int, passes: int) -> None:
    pytest.importorskip("lightning")
    for error, mean, hooks, logged, steps in run(n, lightning_ddp, passes, deadline=120):
        assert error < 1e-5
        assert mean < 1e-6
        assert hooks == [1]
        assert logged["grain/conflicts_aggregate"] == 0
        assert steps == STEPS


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "accumulation": ({"accumulate_grad_batches": 2}, {}),
    "clipping": ({"gradient_clip_val": 0.05}, {}),
    "bf16": ({"precision": "bf16-mixed"}, {}),
    "manual": ({}, {}),
    "several optimizers": ({}, {}),
    "no_sync": ({}, {}),
    "unused": ({}, {"find_unused_parameters": True}),
    "static graph": ({}, {"static_graph": True}),
    "checkpointing": ({}, {}),
    "resume": ({}, {}),
}


def lightning_variant(name: str, callbacks: list[Any], folder: str) -> torch.Tensor:
    """The parameters after some steps of one way to train."""
    import lightning.pytorch as pl
    from lightning.pytorch.strategies import DDPStrategy
    from torch.utils.checkpoint import checkpoint

    by_hand = name in ("manual", "several optimizers", "no_sync")

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            if name == "unused":
                self.seldom = nn.Linear(3, 3)
            self.automatic_optimization = not by_hand

        def forward(self, x: torch.Tensor, number: int) -> torch.Tensor:
            if name == "checkpointing":
                return checkpoint(self.net[1:], self.net[0](x), use_reentrant=False)
            found = self.net(x)
            return self.seldom(found) if name == "unused" and number % 2 else found

        def training_step(self, batch: Any, number: int) -> torch.Tensor | None:
            value = nn.functional.cross_entropy(self(batch[0], number), batch[1])
            if not by_hand:
                return value
            optimizers = self.optimizers()
            optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
            if name == "no_sync" and number % 2 == 0:
                with self.trainer.strategy.block_backward_sync():
                    self.manual_backward(value)
                return None
            self.manual_backward(value)
            for one in optimizers:
                one.step()
                one.zero_grad()
            return None

        def configure_optimizers(self) -> Any:
            if name == "several optimizers":
                parts = self.net[:2], self.net[2:]
                return [torch.optim.SGD(part.parameters(), lr=RATE) for part in parts]
            return torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9)

    trained, ddp = VARIANTS[name]

    def fit(steps: int, **more: Any) -> Any:
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=int(os.environ["WORLD_SIZE"]),
            strategy=DDPStrategy(**ddp),
            max_steps=steps,
            callbacks=[make() for make in callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **trained,
        )
        torch.manual_seed(0)
        module = Module()
        points = torch.utils.data.Subset(Points(), range(32))
        trainer.fit(module, torch.utils.data.DataLoader(points, batch_size=SIZE), **more)
        return trainer, module

    if name == "resume":
        path = os.path.join(folder, "half.ckpt")
        fit(2)[0].save_checkpoint(path)
        return flat(fit(4, ckpt_path=path)[1].parameters())
    return flat(fit(4)[1].parameters())


def lightning_variants(folder: str) -> dict[str, float]:
    """Of each variant: how far the mean is from the plain run."""
    like_torchrun()
    from grain_ddp.lightning import GrainCallback

    def with_state(**options: Any) -> list[Any]:
        return [lambda: GrainCallback(GrainState(**options))]

    found = {}
    for name in VARIANTS:
        plain = lightning_variant(name, [], f"{folder}/plain")
        mean = lightning_variant(name, with_state(weighting="mean"), f"{folder}/mean")
        assert same_everywhere(mean)
        found[name] = relative_error(mean, plain)
    grain = lightning_variant("accumulation", with_state(), folder)
    assert relative_error(grain, lightning_variant("accumulation", [], folder)) > 1e-3
    return found


def test_lightning_variants(tmp_path: Path) -> None:
    """With the mean each is as without the package."""
    pytest.importorskip("lightning")
    for found in run(2, lightning_variants, str(tmp_path), deadline=240):
        assert list(found) == list(VARIANTS)
        for name, error in found.items():
            assert error < (1e-3 if name == "bf16" else 1e-6), name


# What they share


def attached_twice() -> int:
    from grain_ddp.ddp import attach

    net, state = network(), GrainState()
    model = DistributedDataParallel(net)
    assert attach(net, state)
    assert attach(model, state)
    return len(model._comm_hooks)


def test_attach_registers_once() -> None:
    assert run(2, attached_twice) == [1, 1]
