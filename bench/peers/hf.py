"""PEFT on transformers' Llama, by the loop that anyone would write: alone, under DDP, FSDP2, or DeepSpeed's ZeRO-3.

Batches are padded to their longest document. The first adapter is dist_lora's, so that losses can be compared step by step.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bench.peers.padding import Batch, padded
from bench.peers.turns import Job, Turns, read_batches, read_job

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_config(job: Job) -> LoraConfig:
    """The adapters of the job."""
    return LoraConfig(r=job.rank, lora_alpha=job.alpha, target_modules=list(LINEARS), task_type="CAUSAL_LM")


def draw_adapter(model: Any) -> None:
    """A's first values as dist_lora draws them from seed 0, B zero."""
    from dist_lora.lora.layer import initial_a

    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            linear = name.split(".lora_A.")[0].removeprefix("base_model.model.")
            rank, width = parameter.shape
            with torch.no_grad():
                parameter.copy_(initial_a(linear, rank=rank, in_features=width, seed=0))


def quantization(job: Job) -> Any:
    """What makes transformers load the base in the job's format: bitsandbytes' NF4, as in PEFT's own examples."""
    if job.quant == "none":
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )


def build(job: Job) -> Any:
    """The model with its adapters, whole on this rank."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, quantization_config=quantization(job))
    model.config.use_cache = False
    model = get_peft_model(model, lora_config(job))
    draw_adapter(model)
    return model.train()


def documents_of(model: Any, batch: Batch) -> list[float]:
    """The mean loss of each document."""
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    return (losses.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)).tolist()


class Loop:
    """forward, backward, clip, step."""

    def __init__(self, job: Job) -> None:
        self.model = build(job)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=job.lr, weight_decay=0.0)

    def step(self, batch: Batch) -> float:
        """The loss of a batch, from which one step is taken."""
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


class Ddp(Loop):
    """The base whole on every rank, gradients averaged."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.model = torch.nn.parallel.DistributedDataParallel(self.model)


class Fsdp2(Loop):
    """Each layer sharded by torch's ``fully_shard``, and the rest of the model."""

    def __init__(self, job: Job) -> None:
        from torch.distributed.fsdp import fully_shard

        self.model = build(job)
        for layer in self.model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=job.lr, weight_decay=0.0)


class Zero3(Loop):
    """DeepSpeed, stage 3."""

    def __init__(self, job: Job) -> None:
        import deepspeed

        model = build(job)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 1.0,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": 3},
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0)
        self.model, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(self, batch: Batch) -> float:
        """See ``Loop.step``."""
        loss = self.model(**batch).loss
        self.model.backward(loss)
        self.model.step()
        return float(loss.detach())


LOOPS: dict[str, type[Loop]] = {"peft": Loop, "ddp": Ddp, "fsdp2": Fsdp2, "zero3": Zero3}


def main() -> None:
    """One rank."""
    turns, job = Turns(), read_job()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1 and job.kind != "zero3":
        dist.init_process_group("gloo")
    loop = LOOPS[job.kind](job)
    steps = read_batches(job)
    turns.ready()
    done = 0
    for request in turns:
        if request == "documents":
            turns.end(losses=documents_of(loop.model, padded(steps[0])))
            continue
        documents = steps[done][rank::size]
        loss = loop.step(padded(documents))
        turns.end(loss=loss, targets=sum(label != -100 for _, labels in documents for label in labels[1:]))
        done += 1
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
