"""A small language model, made from a config, with Hugging Face's Trainer. Its text: Python's own.

    torchrun --nproc_per_node=2 examples/frameworks/trainer.py
    torchrun --nproc_per_node=2 examples/frameworks/trainer.py --lora
    torchrun --nproc_per_node=2 examples/frameworks/trainer.py --deepspeed \
        examples/frameworks/zero2.json
"""

from __future__ import annotations

import argparse
import builtins
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from grain_ddp import GrainState
from grain_ddp.huggingface import GrainCallback

LENGTH = 64  # bytes, which are the tokens


def text() -> list[dict[str, torch.Tensor]]:
    """What Python says about its builtins, cut into pieces."""
    words = "\n".join(value.__doc__ or "" for value in vars(builtins).values())
    tokens = torch.tensor(list(words.encode("ascii", "ignore")))
    pieces = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lora", action="store_true", help="train low-rank adapters only")
    parser.add_argument("--deepspeed", help="a config with a grain section")
    options = parser.parse_args()
    set_seed(0)

    size = {"vocab_size": 128, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    if options.lora:
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["c_attn", "c_fc"]))

    callbacks = []
    if options.deepspeed:
        import grain_ddp.deepspeed  # noqa: F401  the config decides
    else:
        callbacks = [GrainCallback(GrainState())]

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=2,
                learning_rate=3e-3,
                logging_steps=max(1, options.steps // 4),
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,  # prints the logs instead
                use_cpu=not torch.cuda.is_available(),
                deepspeed=options.deepspeed,
            ),
            train_dataset=text(),
            callbacks=callbacks,
        )
        trainer.train()
    if trainer.is_world_process_zero():
        grain = trainer.model_wrapped.grain if options.deepspeed else callbacks[0].grain
        print(f"{grain.step} aggregated; the weights of the last: {grain.last.weights.round(3)}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
