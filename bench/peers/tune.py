"""torchtune's LoRA model, loss in chunks and loop, as its recipe ``lora_finetune_single_device`` takes a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from bench.peers.padding import padded
from bench.peers.turns import Job, Turns, read_batches, read_job

NAMES = {
    "output_proj": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}


def build(job: Job, longest: int) -> Any:
    """The model of a folder of Hugging Face's, with its adapters."""
    config = json.loads((Path(job.model) / "config.json").read_text())
    heads, kv_heads, width = (config[name] for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
    model = lora_llama3_2(
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        embed_dim=width,
        max_seq_len=max(longest, 2048),
        intermediate_dim=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        rope_base=int(config.get("rope_theta") or config["rope_parameters"]["rope_theta"]),
        scale_factor=1,  # plain frequencies
        lora_rank=job.rank,
        lora_alpha=job.alpha,
    )
    weights = load_file(Path(job.model) / "model.safetensors")
    weights.pop("lm_head.weight", None)
    converted = hf_to_tune(weights, num_heads=heads, num_kv_heads=kv_heads, dim=width)
    missing, unexpected = model.load_state_dict(converted, strict=False)
    assert not unexpected and all("lora" in name for name in missing), (missing, unexpected)
    set_trainable_params(model, get_adapter_params(model))
    draw_adapter(model)
    return model


def draw_adapter(model: Any) -> None:
    """A's first values as dist_lora draws them from seed 0, B zero."""
    from dist_lora.lora.layer import initial_a

    for name, parameter in model.named_parameters():
        if name.endswith("lora_a.weight"):
            parts = name.split(".")  # layers.0.attn.q_proj.lora_a.weight
            linear = NAMES.get(parts[3], f"self_attn.{parts[3]}")
            rank, width = parameter.shape
            first = initial_a(f"model.layers.{parts[1]}.{linear}", rank=rank, in_features=width, seed=0)
            with torch.no_grad():
                parameter.copy_(first)
        elif name.endswith("lora_b.weight"):
            torch.nn.init.zeros_(parameter)


def main() -> None:
    """One process."""
    turns, job = Turns(), read_job()
    steps = read_batches(job)
    model = build(job, max(len(ids) for step in steps for ids, _ in step)).train()
    trained = list(get_adapter_params(model).values())
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0)
    loss_of = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    turns.ready()
    for done, _ in enumerate(turns):
        batch = padded(steps[done])
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        loss = loss_of(model(batch["input_ids"]), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.end(loss=float(loss.detach()))


if __name__ == "__main__":
    main()
