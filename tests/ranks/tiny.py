"""A tiny Llama on disk and documents made by hand: what many tests of several ranks begin with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dist_lora.base.quant.published import open_base_on_disk
from dist_lora.base.stored_shape import has_own_head, stored_base
from dist_lora.config.schema import Config
from dist_lora.data.loader import StepBatch
from dist_lora.data.token_set import TokenSet
from dist_lora.herd.shape import Shape
from dist_lora.lora.origin import BaseIdentity
from dist_lora.train.build import Base, Trainee, build
from dist_lora.world.world import World


def documents(*, seed: int, lengths: list[int], vocab: int = 512, targets_from: float = 0.4) -> TokenSet:
    """Random documents; the tokens after the first ``targets_from`` of each are targets."""
    generator = np.random.default_rng(seed)
    sizes = np.array(lengths, np.int64)
    ids = generator.integers(0, vocab, int(sizes.sum())).astype(np.uint32)
    is_target = np.concatenate([np.arange(n) >= max(1, round(targets_from * n)) for n in lengths])
    starts = np.cumsum(sizes) - sizes
    num_targets = np.array([int(is_target[a + 1 : a + n].sum()) for a, n in zip(starts, sizes, strict=True)])
    return TokenSet(ids, is_target, starts, sizes, num_targets, np.arange(len(sizes)))


def config_of(folder: Path, **settings: dict[str, object]) -> Config:
    """A config for the model in ``folder``; sections are given as mappings."""
    tree: dict[str, object] = {
        "run": "test",
        "model": {"name": str(folder), "dtype": "fp32"},
        "data": {"train": "unused.jsonl"},
        "lora": {"rank": 4, "alpha": 8},
    }
    for section, values in settings.items():
        tree[section] = {**tree.get(section, {}), **values}  # type: ignore[dict-item]
    return Config.model_validate(tree)


def trainee_of(config: Config, world: World, *, has_norms: bool = False) -> Trainee:
    """The model of a config in this rank's share, without a tokenizer."""
    import json

    folder = Path(config.model.name)
    settings = json.loads((folder / "config.json").read_text())
    on_disk = open_base_on_disk(folder, quant=config.model.quant)
    own_head = has_own_head(on_disk.index)
    shape, on_disk = stored_base(Shape.from_config(settings, where=str(folder)), on_disk, own_head=own_head)
    identity = BaseIdentity(name=folder.name, revision=None, content_hash=None, config_hash=None)
    base = Base(folder, settings, shape, on_disk, None, identity)
    return build(config, base, world, has_norms=has_norms)


def accumulate(trainee: Trainee, batch: StepBatch) -> float:
    """The loss of a step, a target token's mean over all ranks; its gradients are summed and wait for the update."""
    trainee.adapters.begin_step()
    losses = []
    for i, micro in enumerate(batch.micro_batches):
        loss = trainee.run(micro)
        trainee.adapters.backward(loss / batch.target_tokens, is_last=i == len(batch.micro_batches) - 1)
        losses.append(loss.detach())
    total = torch.stack(losses).sum()[None]
    trainee.adapters.reduce(total)
    return float(total) / batch.target_tokens


def gathered_base(trainee: Trainee) -> dict[str, torch.Tensor]:
    """Every base tensor whole, on every rank."""
    from torch.distributed.tensor import DTensor

    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in trainee.model.base_parameters().items()
    }


def publish_nf4(source: Path, folder: Path, *, skipped: Sequence[str] = (), shard_size: str | None = None) -> Path:
    """A model's folder as transformers quantizes it to NF4 and saves it, all but the modules of ``skipped``."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", *skipped],
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(folder, **({"max_shard_size": shard_size} if shard_size else {}))
    for file in [*source.glob("tokenizer*"), *source.glob("*.jinja")]:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder
