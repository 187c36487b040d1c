"""Bytes of activations: what a layer saves for its backward, what a pass works in, the logits. No torch.

Letters: T tokens of a micro-batch, K of them with a label, D model width, F feed-forward width, H query heads, G key heads, E width
of a head, V vocabulary, R LoRA rank, L layers; c bytes per number in the compute dtype.
"""

from __future__ import annotations

import itertools
import math

from dist_lora.layout.setup import INPUT_GROUPS, Setup, unfrozen_in
from dist_lora.layout.storage import FP32, quantized_linears

# Elements of the logits that are in fp32 at once: 32 MiB, which a GPU's second-level cache nearly holds.
LOGITS_IN_FP32 = 2**23


def saved_bytes_of_layer(setup: Setup, layer: int) -> int:
    """What autograd saves in a layer's forward for its backward, without recomputation.

    In the letters of this file, per token in c bytes: the inputs of both norms (2 D), queries, attention output, keys and
    values (2 H E + 2 G E), gate and up (2 F); R numbers for each adapter. The normed inputs, and that of down, are computed
    again. In fp32: a log-sum-exp per head and two norm scales. In 16 bits A and B are cast, and the casts are saved. With
    dropout each adapter has a mask of its input, of a byte per number. Before the first adapter there is no graph, and
    nothing is saved; the input of the first adapters is saved itself.
    """
    if layer < setup.first_trained:
        return 0
    shape, c = setup.shape, setup.item_bytes
    targets = set(setup.targets) if layer in setup.layers else set()
    whole = set(unfrozen_in(setup, layer))
    begin = begin_of_graph(setup, layer)
    # A norm that is trained keeps what its own gradient needs, as where its input has one.
    has_first, has_second = begin < 0 or "input_layernorm" in whole, begin < 2 or "post_attention_layernorm" in whole
    heads = shape.num_heads * shape.head_dim
    numbers = fp32_numbers = 0
    if begin <= 0:  # the first norm's input, or what it gives
        numbers += shape.hidden
        fp32_numbers += has_first
        is_repeated, is_tiled = (setup.choices.attention == name for name in ("sdpa-repeated", "tiled"))
        numbers += heads + 2 * (heads if is_repeated else shape.num_kv_heads * shape.head_dim)
        # The kernel keeps its result, and so does o_proj's adapter: concatenated, where documents are.
        has_own = is_tiled or setup.joins_documents
        numbers += heads * (not is_tiled) + heads * (has_own and "o_proj" in targets | whole)
        fp32_numbers += 0 if is_tiled else shape.num_heads
    elif begin == 1:
        numbers += heads
    if begin <= 2:  # the second norm's input, or what it gives
        numbers += shape.hidden + 2 * shape.ffn
        fp32_numbers += has_second
    else:
        numbers += shape.ffn
    sizes = [shape.linear_shapes()[name] for name in targets]
    numbers += setup.lora_rank * len(targets)
    masks = sum(width for _, width in sizes) if setup.has_dropout else 0
    casts = 0 if c == FP32 else c * setup.lora_rank * sum(out + width for out, width in sizes)
    return setup.micro_tokens * (c * numbers + FP32 * fp32_numbers + masks) + casts


def begin_of_graph(setup: Setup, layer: int) -> int:
    """The group of linears where a layer's graph begins; -1 if its input has a gradient. Not for those before the first trained."""
    if layer > setup.first_trained or setup.trained_rows:
        return -1
    whole = set(unfrozen_in(setup, layer))
    trained = whole | (set(setup.targets) if layer in setup.layers else set())
    norms = ("input_layernorm", "", "post_attention_layernorm", "")
    return next(i for i, group in enumerate(INPUT_GROUPS) if trained.intersection(group) or norms[i] in whole)


def _saved_by_layer(setup: Setup) -> list[int]:
    """``saved_bytes_of_layer`` of every layer, computed once for those that are alike."""
    first, adapted = setup.first_trained, set(setup.layers)
    kinds = [
        (layer < first, layer == first, layer in adapted, unfrozen_in(setup, layer))
        for layer in range(setup.shape.num_layers)
    ]
    of_kind = {kind: saved_bytes_of_layer(setup, kinds.index(kind)) for kind in set(kinds)}
    return [of_kind[kind] for kind in kinds]


def rows_of_slice(vocab: int, *, item_bytes: int) -> int:
    """Rows of a slice of logits: 1,024 in 16 bits and 256 in fp32 at Llama 3's vocabulary, never fewer than 128.

    The head is read twice for each slice, so fewer rows would wait for memory on a GPU. A multiple of 128, the rows of a tile of
    its matmuls. With 1,024 the product that gives the gradient has a tile for each multiprocessor, even at D = 4,096.
    """
    slice_bytes = 2**28 if item_bytes == 2 else 2**27
    return max(128, slice_bytes // (item_bytes * vocab) // 128 * 128)


def fp32_rows_of_slice(vocab: int) -> int:
    """Rows of logits that are in fp32 at once, where the slice is in 16 bits."""
    return max(1, LOGITS_IN_FP32 // vocab)


def logit_rows(setup: Setup) -> int:
    """Tokens of a micro-batch whose logits are computed at once."""
    return min(setup.micro_tokens, rows_of_slice(setup.shape.vocab, item_bytes=setup.item_bytes))


def logits_bytes(setup: Setup) -> int:
    """Bytes of logits: a slice, and in 16 bits without fused kernels some of its rows in fp32. All slices have the same memory."""
    vocab, rows = setup.shape.vocab, logit_rows(setup)
    in_fp32 = 0 if setup.item_bytes == FP32 or setup.choices.fused_kernels else min(rows, fp32_rows_of_slice(vocab))
    return vocab * (rows * setup.item_bytes + in_fp32 * FP32)


def dequantized_bytes(setup: Setup) -> int:
    """The largest linear, dequantized for a product; 0 if the base is not quantized."""
    if setup.quant == "none":
        return 0
    return setup.item_bytes * max((out * width for out, width in quantized_linears(setup.shape).values()), default=0)


def largest_cast(setup: Setup, layer: int) -> int:
    """The largest linear of a layer that is trained itself, in the compute dtype, in which its products are computed."""
    shapes, c = setup.shape.linear_shapes(), setup.item_bytes
    sizes = (math.prod(shapes[kind]) for kind in unfrozen_in(setup, layer) if kind in shapes)
    return 0 if c == FP32 else c * max(sizes, default=0)


class Activations:
    """Bytes that a step's activations take.

    ``stream`` is a layer's output, ``wide`` a gate or the input of down_proj, ``in_fp32`` a layer's output in fp32.
    """

    def __init__(self, setup: Setup) -> None:
        shape, c = setup.shape, setup.item_bytes
        self._setup = setup
        self.stream, self.wide = setup.micro_tokens * shape.hidden * c, setup.micro_tokens * shape.ffn * c
        self.in_fp32 = setup.micro_tokens * shape.hidden * FP32
        self._of_layers = _saved_by_layer(setup)
        rotary = setup.micro_tokens * shape.head_dim * c  # cosines and sines, shared by all layers
        kept = (self.stream if i in setup.recomputed else saved for i, saved in enumerate(self._of_layers))
        self._kept = list(itertools.accumulate(kept, initial=rotary))
        has_dropout = setup.has_dropout and "down_proj" in setup.targets
        self._dropped, self._dequantized = self.wide if has_dropout else 0, dequantized_bytes(setup)
        self.of_last_norm = self.stream + setup.micro_tokens * FP32

    def kept_before(self, layer: int) -> int:
        """What the layers before ``layer`` save for the backward: everything, or only their inputs."""
        return self._kept[layer]

    @property
    def kept(self) -> int:
        """What all layers save for the backward."""
        return self._kept[-1]

    def at_backward_of(self, layer: int) -> int:
        """What layers have saved at the backward of ``layer``, which makes its own again if it recomputes; its input is kept."""
        if layer not in self._setup.recomputed:
            return self._kept[layer + 1]
        is_kept = layer > self._setup.first_trained or self._setup.trained_rows
        return self._kept[layer + 1] + self._of_layers[layer] - (self.stream if is_kept else 0)

    def in_forward_of(self, layer: int) -> int:
        """What a layer holds at its down_proj: its input, the sum that the second norm takes, gate, up, down's input and output.

        A layer that doesn't recompute saves more; of those it saves gate and up, or down's input, and what its norms take.
        """
        setup, dense = self._setup, max(self._dequantized, largest_cast(self._setup, layer))
        held = 3 * self.stream + 3 * self.wide + max(self._dropped, dense)
        if not setup.choices.fused_kernels:  # SiLU of the gate before it is multiplied; down's output isn't there yet
            held = max(held, 2 * self.stream + 4 * self.wide)
        if layer < setup.first_trained or layer in setup.recomputed:
            return held
        begin = begin_of_graph(setup, layer)
        of_norms = 2 if begin < 0 else int(begin < 2)
        saved = self.wide if begin == 3 else 2 * self.wide + of_norms * self.stream
        return held + self._of_layers[layer] - saved

    def in_backward_of_down(self, layer: int) -> int:
        """The gradient of a layer's output, and of down's input beside its weight or its dropped copy, or of gate and up.

        With fused kernels these lie where gate and up were. A recomputation ends with down's input, its dropped copy and, since
        its adapter comes before the frozen product, the output.
        """
        dropped = self._dropped if self._setup.choices.fused_kernels else self.wide + self._dropped
        recomputed = self._dropped + self.stream if layer in self._setup.recomputed else 0
        return self.stream + self.wide + max(dropped, self._dequantized, recomputed)

    @property
    def at_embedding(self) -> int:
        """The embedding's output; with trained rows the frozen rows, the trained ones and what is chosen of both."""
        return 3 * self.stream if self._setup.trained_rows else self.stream

    @property
    def at_loss(self) -> int:
        """Beside the logits the gradient of what the head takes; with trained rows also that through these."""
        setup = self._setup
        of_rows = logit_rows(setup) * setup.shape.hidden * setup.item_bytes if setup.trained_rows else 0
        return 2 * self.stream + of_rows

    @property
    def in_backward_of_norm(self) -> int:
        """The gradients of what the last norm gives, of what it takes, and of all rows."""
        return 3 * (self.stream if self._setup.choices.fused_kernels else self.in_fp32) + self.stream
