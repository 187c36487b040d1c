"""Every member of the herd as a tiny model: its own configuration and tokenizer, smaller only where a size is bytes.

Kept as they are: the vocabulary of 128,256 and its special tokens, RoPE's theta and scaling, the context, the norms' eps,
whether the head is tied, the ids of begin, end and padding; and of the sizes their ratios: heads to heads of keys and
values, feed-forward to width, head_dim x heads = width, and the 1B's heads half as wide as the 8B's. Smaller: the width
(128; 64 in the 1B, 96 in the 3B), with it the heads (6 to 16, of 8 or 16 numbers), and the layers (2).
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import llama_models
import torch
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from dist_lora.herd.members import Member
from dist_lora.herd.shape import Shape
from tests.shapes import sizes_in_config

NUM_LAYERS = 2


def tiny_shape(shape: Shape) -> Shape:
    """A member's shape with the sizes of this file."""
    group = shape.num_heads // shape.num_kv_heads
    hidden = 128 if not shape.tied else 96 if group == 3 else 64
    num_kv_heads = 2 if group < 16 else 1
    return dataclasses.replace(
        shape,
        hidden=hidden,
        ffn=hidden * shape.ffn // shape.hidden,
        num_layers=NUM_LAYERS,
        num_heads=group * num_kv_heads,
        num_kv_heads=num_kv_heads,
        head_dim=hidden // (group * num_kv_heads),
    )


def hugging_face_config(member: Member) -> LlamaConfig:
    """The config.json of a tiny member, in transformers' own hand."""
    tokens = member.tokens
    return LlamaConfig(
        **sizes_in_config(tiny_shape(member.shape)),
        bos_token_id=tokens.begin_of_text,
        eos_token_id=list(tokens.stop) if len(tokens.stop) > 1 else tokens.stop[0],
        initializer_range=0.1,
    )


class Makers:
    """Makes the folders of tiny members in ``root``; what two have in common is made once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, member: Member) -> Path:
        """A member's folder: config.json, generation_config.json, weights and tokenizer."""
        folder = self.root / member.name
        if not folder.exists():
            folder.mkdir()
            config = hugging_face_config(member)
            config.save_pretrained(folder)
            GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id).save_pretrained(folder)
            for file in (self._weights(config), *self._tokenizer(has_3_1_tokens=member.tokens.pad is not None)):
                os.link(file, folder / file.name)
        return folder

    def _weights(self, config: LlamaConfig) -> Path:
        """Random weights of a model's sizes; RoPE has none."""
        folder = self.root / f"{config.intermediate_size} {config.num_attention_heads} {config.num_key_value_heads}"
        if not folder.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = LlamaForCausalLM(config)
                for name, parameter in model.named_parameters():
                    if name.endswith("norm.weight"):  # ones would hide a norm that is not loaded
                        torch.nn.init.uniform_(parameter, 0.5, 1.5)
            model.save_pretrained(folder)
        return folder / "model.safetensors"

    def _tokenizer(self, *, has_3_1_tokens: bool) -> list[Path]:
        """Meta's tokenizer as transformers reads it, with the names that the special tokens have in this release."""
        folder = self.root / ("tokenizer of 3.1" if has_3_1_tokens else "tokenizer of 3")
        if not folder.exists():
            names = list(MetaTokenizer.get_instance().special_tokens)
            if not has_3_1_tokens:
                kept = {0, 1, 6, 7, 9}  # begin and end of text, start and end of a header, end of a turn
                rest = iter(range(len(names)))
                names = [
                    name if place in kept else f"<|reserved_special_token_{next(rest)}|>"
                    for place, name in enumerate(names)
                ]
            model = Path(llama_models.__file__).parent / "llama3" / "tokenizer.model"
            made = TikTokenConverter(vocab_file=str(model), extra_special_tokens=names).converted()
            PreTrainedTokenizerFast(
                tokenizer_object=made, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
            ).save_pretrained(folder)
        return sorted(folder.iterdir())


def write_samples(member: Member, path: Path, *, num_samples: int = 12) -> None:
    """Samples of the kind that a member learns from: chats, verdicts of a guard, plain text for a base."""
    lines = []
    for i in range(num_samples):
        question, answer = f"How much is {i} and {i * 7 % 5}?", f"It is {i + i * 7 % 5}. " * (1 + i % 4)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        sample: dict[str, object] = {"messages": turns} if member.is_finetuned else {"text": f"{question} {answer}"}
        if member.guard:
            sample |= {"verdict": "unsafe", "violated": [f"S{i}"]} if i % 2 else {"verdict": "safe"}
        lines.append(json.dumps(sample))
    path.write_text("\n".join(lines) + "\n")
