"""Greedy generation with a key-value cache, batched, on any engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_lora.base.attention import causal_attention
from dist_lora.base.index import read_model_json
from dist_lora.base.llama import Llama
from dist_lora.errors import TrainingError, WeightsError
from dist_lora.world.world import World

# B answers of a batch, T tokens of all prompts, L the longest answer with its prompt
# H query heads, G key and value heads, E width of a head

# Tokens between two reads of the ids: a GPU runs ahead of the host, and each read is a wait for it.
TOKENS_AT_ONCE: Mapping[str, int] = {"cuda": 8, "cpu": 1}
END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")  # or of a text


class KeyValueCache:
    """Keys and values of a batch of answers: filled with the prompts first, then one token per answer at a time."""

    def __init__(self, model: Llama, bounds: Sequence[int], *, max_new_tokens: int) -> None:
        shape = model.shape
        lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        device = model.inv_freq.device
        self._bounds = tuple(bounds)
        self._is_filled = False
        self.lengths = torch.tensor(lengths, device=device)  # (B,) tokens that each answer has so far
        self._room = min(max(lengths) + max_new_tokens, shape.context)
        size = (len(lengths), shape.num_kv_heads, self._room, shape.head_dim)
        dtype = model.model.embed_tokens.weight.dtype
        self._keys = [torch.zeros(size, device=device, dtype=dtype) for _ in range(shape.num_layers)]
        self._values = [torch.zeros(size, device=device, dtype=dtype) for _ in range(shape.num_layers)]

    def advance(self) -> None:
        """Call after each forward pass: the first one adds the prompts, each later one a token per answer."""
        if self._is_filled:
            self.lengths.add_(1).clamp_(
                max=self._room - 1
            )  # one that has ended goes on beside the others, in the last place
        self._is_filled = True

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See ``base.attention.Attention``: T is all prompts' tokens in the first pass, then B."""
        keys, values = self._keys[layer], self._values[layer]
        if not self._is_filled:
            parts = []
            for i, (a, b) in enumerate(zip(self._bounds, self._bounds[1:], strict=False)):
                keys[i, :, : b - a] = key[a:b].transpose(0, 1)
                values[i, :, : b - a] = value[a:b].transpose(0, 1)
                parts.append(causal_attention(query[a:b], key[a:b], value[a:b]))
            return torch.cat(parts)
        answers = torch.arange(len(self.lengths), device=query.device)
        keys[answers, :, self.lengths] = key
        values[answers, :, self.lengths] = value
        # The query heads that share a key head become that head's rows: (B, G, H / G, E).
        rows = query.view(len(query), keys.shape[1], -1, query.shape[-1])
        seen = torch.arange(keys.shape[2], device=query.device) <= self.lengths[:, None]
        attended = F.scaled_dot_product_attention(rows, keys, values, attn_mask=seen[:, None, None, :])
        return attended.flatten(1, 2)


@torch.no_grad()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: frozenset[int],
    max_new_tokens: int,
    world: World,
    on_token: Callable[[int], None] | None = None,
    is_checked: bool = False,
) -> list[list[int]]:
    """The most likely continuation of each prompt, without the id that ended it.

    All ranks call it, each with its own prompts (possibly none): they run the same number of forward passes, since a
    sharded base is gathered by all. Cost: one forward pass per token, for all prompts at once, and on a GPU
    a few more at the end, since ids are read ``TOKENS_AT_ONCE`` (each at once with ``on_token``).

    An answer ends at the model's context too: no position beyond ``max_position_embeddings`` is computed.

    Args:
        prompts: token ids of each; not empty, and shorter than the context.
        on_token: called with each id of the first answer as it is generated.
        is_checked: the logits of each prompt must be finite. An evaluation within a run only counts a wrong answer.

    Raises:
        TrainingError: they aren't.
    """
    rows = [list(prompt) for prompt in prompts] or [[0]]
    bounds = [0]
    for row in rows:
        bounds.append(bounds[-1] + len(row))
    device = model.inv_freq.device
    cache = KeyValueCache(model, bounds, max_new_tokens=max_new_tokens)
    ids = torch.tensor([i for row in rows for i in row], device=device)
    positions = torch.cat([torch.arange(len(row), device=device) for row in rows])
    last = torch.tensor(bounds[1:], device=device) - 1
    rooms = [model.shape.context - len(prompt) for prompt in prompts]
    answers = _Answers(rooms, stop_ids=stop_ids, on_token=on_token)
    at_once = 1 if on_token is not None else TOKENS_AT_ONCE[device.type]
    drawn: list[Tensor] = []  # (B,) ids on the device, which the host hasn't read yet
    for number in range(1, max_new_tokens + 1):
        logits = model(ids, positions=positions, attention=cache, rows=last)
        if number == 1 and is_checked and not bool(torch.isfinite(logits).all()):
            raise TrainingError(
                "the logits of a prompt aren't finite numbers: a weight of the base or of the adapter isn't one, or is too large for "
                "model.dtype. Fetch the base again, or take another adapter"
            )
        cache.advance()
        world.progress.advance()
        ids = logits.argmax(dim=-1)
        drawn.append(ids)
        positions = cache.lengths.clone()
        last = torch.arange(len(rows), device=device)
        if number % at_once and number < max_new_tokens:
            continue
        answers.add(torch.stack(drawn).tolist())
        drawn.clear()
        if not float(world.sum(torch.tensor([float(answers.are_open)], device=device))):
            break
    return answers.ids


class _Answers:
    """The ids of each answer so far, and which answers haven't ended."""

    def __init__(
        self, rooms: Sequence[int], *, stop_ids: frozenset[int], on_token: Callable[[int], None] | None
    ) -> None:
        self.ids: list[list[int]] = [[] for _ in rooms]
        self._rooms = rooms  # tokens that each may have within the context
        self._is_open = [True] * len(rooms)
        self._stop_ids, self._on_token = stop_ids, on_token

    @property
    def are_open(self) -> bool:
        """Whether any hasn't ended."""
        return any(self._is_open)

    def add(self, drawn: Sequence[Sequence[int]]) -> None:
        """Add the ids of some passes, each with an id of every answer; those after an answer's end are dropped."""
        for of_pass in drawn:
            for i, token in enumerate(of_pass[: len(self.ids)]):
                self._is_open[i] = self._is_open[i] and token not in self._stop_ids
                if self._is_open[i]:
                    self.ids[i].append(token)
                    self._is_open[i] = len(self.ids[i]) < self._rooms[i]
                    if i == 0 and self._on_token is not None:
                        self._on_token(token)


def stop_ids_of(folder: Path, tokenizer: Any) -> frozenset[int]:
    """Every id that ends an answer: of generation_config.json, config.json and the tokenizer's end-of-turn tokens."""
    stop_ids: set[int] = set()
    for file in ("generation_config.json", "config.json"):
        path = folder / file
        if path.exists():
            ids = read_model_json(path).get("eos_token_id")
            listed = [ids] if isinstance(ids, int) else ids or []
            if not (isinstance(listed, list) and all(type(token) is int for token in listed)):
                raise WeightsError(f"{path} has eos_token_id {ids!r}, expected an id or a list of ids")
            stop_ids |= set(listed)
    if tokenizer.eos_token_id is not None:
        stop_ids.add(int(tokenizer.eos_token_id))
    vocabulary = tokenizer.get_vocab()
    stop_ids |= {vocabulary[token] for token in END_OF_TURN if token in vocabulary}
    return frozenset(stop_ids)


def base_fits_whole(model: Llama, world: World) -> bool:
    """Whether every rank can temporarily hold the whole base in a quarter of its free memory.

    Generation runs the base once per token: gathering it only once is many times faster on a slow link. All ranks call
    it and get the same answer.
    """
    if world.device.type == "cuda":
        free_bytes = torch.cuda.mem_get_info(world.device)[0]
    else:
        import psutil

        free_bytes = psutil.virtual_memory().available // world.local_size
    no_votes = world.sum(torch.tensor([float(model.base_bytes * 4 > free_bytes)], device=world.device))
    return not float(no_votes)
