"""The loop that anyone would write on transformers' and PEFT's models, on the batches of a run of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from dist_lora.config.schema import Config
from dist_lora.lora.layer import initial_a
from tests.e2e.test_against_peft import padded_batches

WARMUP_STEPS, WEIGHT_DECAY = 2, 0.01  # as chats_settings has them


def draw_first_a(model: Any) -> None:
    """Each A of PEFT's model as a run of ours draws it."""
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            linear = name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            first = initial_a(linear, rank=parameter.shape[0], in_features=parameter.shape[1], seed=0)
            parameter.data.copy_(first)


def train_by_hand(model: Any, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> list[float]:
    """The loss of each step; the learning rate rises over the warm-up and stays."""
    losses = []
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
    for ids, mask, labels in padded_batches(Config.model_validate(settings)):
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses
