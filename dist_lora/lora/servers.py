"""What vLLM, TGI, llama.cpp and Ollama take of an adapter or a merged model, and what they refuse or would serve wrongly.

The rules were read in their sources, never run here. Where a server doesn't do what PEFT does with the same folder, it
answers with another model than the one that was trained, mostly without an error. Needs no torch.

=========  ====================================================================  ========================================
server     file (repository at the commit that was read)                         what it says
=========  ====================================================================  ========================================
vLLM       vllm/config/lora.py (vllm-project/vllm a78dc92f)                      max_lora_rank: 16, or a few others to 512
vLLM       vllm/lora/peft_helper.py (e745baff), vllm/lora/lora_weights.py        one factor for all linears, lora_alpha / r
           (4c78406e): PEFTHelper, LoRALayerWeights.from_config                  (rsLoRA: / sqrt(r)); no patterns are read
vLLM       vllm/lora/layers/base_linear.py (01235a49): set_lora                  a larger rank doesn't fit its buffers
vLLM       vllm/lora/utils.py: parse_fine_tuned_lora_name                        a tensor that isn't lora_A or lora_B is an
                                                                                 error: trained tokens' rows too
vLLM       vllm/lora/layers/logits_processor.py (01815c62)                       with adapters at most 258,048 tokens
TGI        server/text_generation_server/models/__init__.py                      linear by linear, q to down, each with the
           (huggingface/text-generation-inference abd58ff8)                      same settings
TGI        server/text_generation_server/adapters/lora.py (e582eed6):            one factor; a linear has to be adapted in
           LoraWeights.prepare_weights                                           all layers; ``config.r`` becomes the padded
                                                                                 rank, by which the next linears are scaled
TGI        server/text_generation_server/utils/adapter.py (4b569341):            tensors that belong to no linear of the
           load_module_map                                                       model are not looked at
TGI        server/text_generation_server/utils/sgmv.py (04e1af94): pad_rank      up to 8 per GPU, else a multiple of 16
llama.cpp  src/llama-adapter.h (ggml-org/llama.cpp 215841fc): get_scale          lora_alpha / the tensor's own rank
llama.cpp  convert_lora_to_gguf.py (0b03adaa)                                    needs the base's config.json; alpha alone;
                                                                                 'Not a lora_A or lora_B tensor' ends it
llama.cpp  convert_hf_to_gguf.py: get_vocab_base_pre                             tokenizers are known by a checksum
Ollama     convert/convert.go (ollama/ollama 33ee7168): AdapterParameters        lora_alpha is a whole number
Ollama     convert/convert_llama_adapter.go (5ee9c799): repack                   heads of q and k are reordered in A, where
                                                                                 the base's are in the rows, which are B's
Ollama     the same: Tensors                                                     a wide A or a tall B is taken as transposed
Ollama     convert/convert_llama.go (d8aec7f4)                                   reads rope_theta and rope_scaling only
Ollama     runner/ollamarunner/runner.go                                         its newer engine takes no adapters at all
=========  ====================================================================  ========================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dist_lora.config.schema import LINEARS, ModuleAdapter
from dist_lora.herd.unfrozen import describe_unfrozen
from dist_lora.text import count, first_few, in_columns

Verdict = Literal["yes", "wrong", "no"]

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16
_VLLM_MAX_VOCAB = 258_048
_TGI_MIN_RANK = 8  # on each GPU
_TGI_RANK_STEP = 16
_ROTATED = ("q_proj", "k_proj")  # whose rows RoPE turns, in llama.cpp in another order than in the hub's files
_LLAMA = "LlamaForCausalLM"


@dataclass(frozen=True)
class Served:
    """What a server does with a result.

    Args:
        verdict: "yes", "wrong" (it would answer as another model than the one that was trained) or "no" (it refuses).
        why: what is to be done, or what is wrong.
    """

    server: str
    verdict: Verdict
    why: str

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """An adapter as servers see it.

    Args:
        rank, alpha: ``r`` and ``lora_alpha`` of adapter_config.json.
        modules: every adapted linear with its own rank and the alpha that gives its scale, of rsLoRA too.
        num_layers: of the base.
        min_width: the narrowest input or output of an adapted linear.
        vocab: tokens of the base; None where it isn't known here.
        has_tokens: it has rows of trained tokens.
        unfrozen: linears and norms whose whole weights it has.
    """

    rank: int
    alpha: float
    has_rslora: bool
    modules: Sequence[ModuleAdapter]
    num_layers: int
    min_width: int
    vocab: int | None = None
    has_tokens: bool = False
    unfrozen: Sequence[str] = ()

    @property
    def ranks(self) -> list[int]:
        """All ranks, ascending."""
        return sorted({module.rank for module in self.modules})

    @property
    def scale(self) -> float:
        """The factor of B A by the settings that hold for all."""
        return self.alpha / (math.sqrt(self.rank) if self.has_rslora else self.rank)


def serve_adapter(files: AdapterFiles) -> list[Served]:
    """What each server does with an adapter's folder."""
    if files.unfrozen:
        return list(_with_whole_weights(files.unfrozen))
    if files.has_tokens:
        return _serve_tokens()
    return [_vllm(files), _tgi(files), _llama_cpp(files), _ollama(files)]


def _serve_tokens() -> list[Served]:
    """An adapter that has rows of embedding and head: no server puts them there."""
    tensors = "trained tokens' rows (trainable_tokens_delta)"
    return [
        Served("vLLM", "no", f"refuses {tensors} as an unsupported LoRA weight; {_MERGE}"),
        Served("TGI", "wrong", f"it ignores {tensors}, and computes with the base's; {_MERGE}"),
        Served(
            "llama.cpp", "no", f"convert_lora_to_gguf.py refuses {tensors}: not a lora_A or lora_B tensor; {_MERGE}"
        ),
        Served("Ollama", "no", f"takes adapters as llama.cpp does, which refuses {tensors}; {_MERGE}"),
    ]


def _with_whole_weights(unfrozen: Sequence[str]) -> Iterator[Served]:
    """Of an adapter that also has whole weights, which only PEFT replaces.

    llama.cpp's converter ends at a whole linear; norms it writes, and the server passes over them (b6000), as Ollama does.
    """
    whole = f"whole weights (modules_to_save): {describe_unfrozen(unfrozen)}"
    yield Served("vLLM", "no", f"it has {whole}; {_MERGE}")
    yield Served("TGI", "wrong", f"it loads A and B alone, without the {whole}; {_MERGE}")
    is_norms = all(name.endswith("norm") for name in unfrozen)
    for server in ("llama.cpp", "Ollama"):
        verdict: Verdict = "wrong" if is_norms else "no"
        yield Served(server, verdict, f"{'it passes over the' if is_norms else 'it has'} {whole}; {_MERGE}")


def _vllm(files: AdapterFiles) -> Served:
    largest = files.ranks[-1]
    if largest > _VLLM_RANKS[-1]:
        return Served("vLLM", "no", f"rank {largest}, and its largest --max-lora-rank is {_VLLM_RANKS[-1]}; {_MERGE}")
    if files.vocab is not None and files.vocab > _VLLM_MAX_VOCAB:
        return Served(
            "vLLM",
            "no",
            f"a vocabulary of {files.vocab:,}, and with adapters {_VLLM_MAX_VOCAB:,} are allowed; {_MERGE}",
        )
    if (wrong := _scaled_otherwise(files.modules, files.scale)) is not None:
        return Served(
            "vLLM", "wrong", f"it ignores rank_pattern and alpha_pattern and multiplies all by {files.scale:g}: {wrong}"
        )
    needed = next(rank for rank in _VLLM_RANKS if rank >= largest)
    option = f" --max-lora-rank {needed}" if needed > _VLLM_DEFAULT_RANK else ""
    return Served("vLLM", "yes", f"vllm serve BASE --enable-lora{option} --lora-modules NAME=FOLDER")


def _tgi(files: AdapterFiles) -> Served:
    by_linear = _by_linear(files)
    partial = [linear for linear, modules in by_linear.items() if len(modules) < files.num_layers]
    if partial:
        return Served(
            "TGI",
            "no",
            f"it takes a linear's adapters only where all layers have them, unlike {first_few(partial)}; {_MERGE}",
        )
    for linear, modules in by_linear.items():
        if len({_padded(module.rank, num_gpus=1) for module in modules}) > 1:
            return Served("TGI", "no", f"the ranks of {linear} differ from layer to layer; {_MERGE}")
    if (wrong := _scaled_by_tgi(files, num_gpus=1)) is not None:
        return Served("TGI", "wrong", f"{wrong}; {_MERGE}")
    num_gpus = max(n for n in (1, 2, 4, 8) if _scaled_by_tgi(files, num_gpus=n) is None)
    limit = (
        ""
        if num_gpus == 8
        else f" (on {count(num_gpus, 'GPU')} at most: on more it pads the rank and scales otherwise)"
    )
    return Served("TGI", "yes", f"LORA_ADAPTERS=NAME=FOLDER text-generation-launcher --model-id BASE{limit}")


def _by_linear(files: AdapterFiles) -> dict[str, list[ModuleAdapter]]:
    """The adapters by linear, in TGI's order, which is ours."""
    sorted_out = {linear: [module for module in files.modules if module.linear == linear] for linear in LINEARS}
    return {linear: modules for linear, modules in sorted_out.items() if modules}


def _scaled_by_tgi(files: AdapterFiles, *, num_gpus: int) -> str | None:
    """Which linear TGI scales otherwise than it was trained; None if none.

    It multiplies a linear's B by lora_alpha / r, and r is then the rank that it has padded this linear to.
    """
    rank = files.rank
    for modules in _by_linear(files).values():
        scale = files.alpha / (math.sqrt(rank) if files.has_rslora else rank)
        for module in modules:
            if not _is_close(module.scale, scale):
                return (
                    f"it multiplies {module.name} by {scale:g} in place of {module.scale:g}, since it reads no patterns and "
                    "goes on with the rank that it padded the linear before to (rank 8 and multiples of 16 aren't padded)"
                )
        rank = _padded(modules[0].rank, num_gpus=num_gpus)
    return None


def _padded(rank: int, *, num_gpus: int) -> int:
    """What TGI pads a rank to."""
    least = _TGI_MIN_RANK * num_gpus
    return least if rank <= least else math.ceil(rank / _TGI_RANK_STEP) * _TGI_RANK_STEP


def _llama_cpp(files: AdapterFiles) -> Served:
    wrong = _scaled_by_alpha(files)
    if wrong is not None:
        return Served("llama.cpp", "wrong", wrong)
    return Served(
        "llama.cpp",
        "yes",
        "python convert_lora_to_gguf.py FOLDER --base BASE_FOLDER --outfile adapter.gguf, then llama-server -m BASE.gguf "
        "--lora adapter.gguf",
    )


def _ollama(files: AdapterFiles) -> Served:
    if (wrong := _scaled_by_alpha(files)) is not None:
        return Served("Ollama", "wrong", wrong)
    rotated = [name for name in _ROTATED if name in {module.linear for module in files.modules}]
    if rotated:
        why = f"reorders the heads of {' and '.join(rotated)} in the wrong matrix"
    elif files.ranks[-1] > files.min_width:
        why = f"transposes what has a rank ({files.ranks[-1]}) above a linear's width ({files.min_width})"
    elif not float(files.alpha).is_integer():
        why = f"takes whole numbers for lora_alpha only, not {files.alpha:g}"
    else:
        return Served("Ollama", "yes", f"a Modelfile with FROM BASE and ADAPTER FOLDER {_OLD_ENGINE}")
    return Served(
        "Ollama",
        "yes",
        f"convert it as for llama.cpp; a Modelfile with FROM BASE and ADAPTER ./adapter.gguf {_OLD_ENGINE}. Never ADAPTER "
        f"FOLDER: its own conversion {why}",
    )


_OLD_ENGINE = "(where it says 'loras are not yet implemented', merge it)"
_MERGE = "merge it (dist-lora merge)"


def _is_close(first: float, second: float) -> bool:
    return math.isclose(first, second, rel_tol=1e-6)


def _scaled_otherwise(modules: Iterable[ModuleAdapter], scale: float) -> str | None:
    """Which linears have another factor than ``scale``; None if none has."""
    others = [module for module in modules if not _is_close(module.scale, scale)]
    if not others:
        return None
    more = f" and {len(others) - 1:,} more differ" if len(others) > 1 else ""
    return f"{others[0].name} has {others[0].scale:g}{more}; {_MERGE}"


def _scaled_by_alpha(files: AdapterFiles) -> str | None:
    """What llama.cpp scales otherwise, by lora_alpha and the tensor's own rank; None if nothing."""
    others = [module for module in files.modules if not _is_close(module.scale, files.alpha / module.rank)]
    if not others:
        return None
    what = "use_rslora" if files.has_rslora else "alpha_pattern"
    first = others[0]
    return (
        f"it ignores {what} and multiplies by lora_alpha / rank: {first.name} by {files.alpha / first.rank:g} in place of "
        f"{first.scale:g}{f', and {len(others) - 1:,} more' if len(others) > 1 else ''}; {_MERGE}"
    )


def serve_merged(config: Mapping[str, Any], *, is_float32: bool, is_member: bool) -> list[Served]:
    """What each server does with a merged model's folder.

    Args:
        config: the content of its config.json.
        is_float32: its weights are, which servers round by default.
        is_member: its base is of the herd, so that its tokenizer is Llama 3's.
    """
    named = next(iter(config.get("architectures") or ()), None)
    if named != _LLAMA:
        why = f"config.json names the architecture {named!r}, and {_LLAMA} is expected"
        return [Served(server, "no", why) for server in ("vLLM", "TGI", "llama.cpp", "Ollama")]
    rounded = " (float32 is rounded to 16 bits unless --dtype float32 is added)" if is_float32 else ""
    known = "" if is_member else " (refused if its tokenizer is none of those that the script knows; Llama 3's is)"
    served = [
        Served("vLLM", "yes", f"vllm serve FOLDER{rounded}"),
        Served("TGI", "yes", "text-generation-launcher --model-id FOLDER (in 16 bits)"),
        Served("llama.cpp", "yes", f"python convert_hf_to_gguf.py FOLDER --outfile model.gguf, then llama-server -m model.gguf{known}"),
    ]  # fmt: skip
    if "rope_theta" not in config or (not config.get("rope_scaling") and _is_scaled(config)):
        why = (
            "it reads rope_theta and rope_scaling of config.json, and this one has rope_parameters (of transformers 5): add "
            "both, or convert it as for llama.cpp and write FROM ./model.gguf"
        )
        return [*served, Served("Ollama", "wrong", why)]
    return [*served, Served("Ollama", "yes", "a Modelfile with FROM FOLDER")]


def _is_scaled(config: Mapping[str, Any]) -> bool:
    parameters: Mapping[str, Any] = config.get("rope_parameters") or {}
    return bool(parameters.get("rope_type", "default") != "default")


def lines_of(served: Sequence[Served]) -> list[str]:
    """A line for each server, for people."""
    words = {"yes": "takes it", "wrong": "WRONG", "no": "refuses"}
    return list(in_columns([[each.server, words[each.verdict], each.why] for each in served], indent="  "))


def warning_of(served: Sequence[Served]) -> str:
    """What to warn of: servers that would answer as another model; "" if none would."""
    wrong = [each.server for each in served if each.verdict == "wrong"]
    if not wrong:
        return ""
    return f"{' and '.join(wrong) if len(wrong) < 3 else ', '.join(wrong)} would load this and answer otherwise than it was trained, without an error; see above"
