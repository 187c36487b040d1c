"""What PEFT's ``adapter_config.json`` says: which linears have an adapter, with which rank and which scale.

Names are matched as PEFT 0.21 matches them (``check_target_module_exists`` and ``get_pattern_key``): a linear is found by its
full name, by the end of it, or by a regular expression; patterns of ranks and alphas are regular expressions for its end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import regex

from dist_lora.config.schema import LINEARS, NORMS, ModuleAdapter
from dist_lora.errors import AdapterError, ConfigError
from dist_lora.herd.names import Pattern, end_of_name, short
from dist_lora.herd.shape import module_path
from dist_lora.lora.origin import CONFIG_FILE
from dist_lora.text import first_few

# Settings that make an adapter more than B A on a linear (LoraConfig of PEFT 0.21.2), and what they are.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "biases",
    "fan_in_fan_out": "transposed weights",
    "layer_replication": "repeated layers",
    "target_parameters": "adapters on bare parameters",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
# These change the base's weights too; PEFT writes `true` where it has converted the adapter back.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MODULE = re.compile(r"[\w.]+")
_MAX_LAYERS = 1000  # as many as a Llama may have here
_ALL_LINEAR = "all-linear"
NO_TARGETS = "dummy-target-modules"  # PEFT's name for no adapter at all (``peft.utils.constants``)
_Number = TypeVar("_Number", int, float)
_OF_A_LLAMA = frozenset(("q_proj", "v_proj"))  # PEFT's choice for a Llama without target_modules


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The settings of an ``adapter_config.json`` that decide what is adapted and how; None where it has none."""

    rank: int
    alpha: float
    dropout: float
    has_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | frozenset[str]
    exclude_modules: str | frozenset[str] | None
    layers: frozenset[int] | None
    layers_pattern: Sequence[str]
    unfrozen: tuple[str, ...] = ()  # ends of the names of linears and norms that it has whole weights of
    tokens: tuple[int, ...] = ()  # whose rows of the embedding (and of the head) it has, in the order of its rows
    file: Path = Path(CONFIG_FILE)

    @property
    def has_no_adapters(self) -> bool:
        """Whether it has whole weights or rows of tokens alone."""
        return self.target_modules == NO_TARGETS and bool(self.unfrozen or self.tokens)

    def covers(self, module: str) -> bool:
        """Whether PEFT attaches an adapter to a linear of this full name."""
        excluded, targets = self.exclude_modules, self.target_modules
        if isinstance(excluded, str):
            if self._pattern(excluded).fullmatch(module):
                return False
        elif excluded and _is_named(module, excluded):
            return False
        if any(re.match(rf"(^|.*\.){end}($|\..*)", module) for end in self.unfrozen):
            return False  # PEFT 0.21 has no adapter on a weight that is saved whole
        if isinstance(targets, str):
            return targets.lower() == _ALL_LINEAR or self._pattern(targets).fullmatch(module) is not None
        if module in targets:
            return True  # whatever layers_to_transform says
        return _is_named(module, targets) and (self.layers is None or self._layer_of(module) in self.layers)

    def modules(self, layers: Iterable[int]) -> list[str]:
        """All of Llama's linears in these layers that have an adapter, in the model's order."""
        names = (module_path(linear, layer=layer) for layer in layers for linear in LINEARS)
        return [name for name in names if self.covers(name)]

    def adapter_of(self, module: str) -> ModuleAdapter:
        """Rank and alpha of the adapter on a linear; for rsLoRA the alpha that gives its scale, alpha / sqrt(R)."""
        rank = _of_pattern(self._ranks, module, self.rank)
        alpha = _of_pattern(self._alphas, module, self.alpha)
        return ModuleAdapter(name=module, rank=rank, alpha=alpha * math.sqrt(rank) if self.has_rslora else alpha)

    @property
    def scale(self) -> float:
        """What B A is multiplied by where no pattern says otherwise."""
        return self.alpha / (math.sqrt(self.rank) if self.has_rslora else self.rank)

    def unmatched_patterns(self, modules: Iterable[str]) -> list[str]:
        """Keys of ``rank_pattern`` and ``alpha_pattern`` that match none of the adapted linears: they have no effect."""
        names = list(modules)
        return [
            f"{setting}: {key}"
            for setting, pairs in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas))
            for key, (pattern, _) in zip(getattr(self, setting), pairs, strict=True)
            if not any(pattern.match(name) for name in names)
        ]

    def _layer_of(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self.layers_pattern]
        patterns = patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        matches = (self._pattern(pattern).match(module) for pattern in patterns)
        return next((int(match["idx"]) for match in matches if match), None)

    def _pattern(self, text: str) -> Pattern:
        if text not in self._patterns:
            self._patterns[text] = Pattern(text, file=self.file)
        return self._patterns[text]

    @cached_property
    def _patterns(self) -> dict[str, Pattern]:
        return {}

    @cached_property
    def _ranks(self) -> list[tuple[Pattern, int]]:
        return [(self._pattern(end_of_name(key)), rank) for key, rank in self.rank_pattern.items()]

    @cached_property
    def _alphas(self) -> list[tuple[Pattern, float]]:
        return [(self._pattern(end_of_name(key)), alpha) for key, alpha in self.alpha_pattern.items()]


def read_peft_config(config: Mapping[str, Any], *, folder: Path) -> PeftConfig:
    """The settings of the ``adapter_config.json`` in ``folder``, whose content is ``config``.

    Raises:
        ConfigError: it asks for more than plain LoRA on Llama's linears, or for what PEFT refuses; names all of it.
        AdapterError: a setting is of another type than PEFT writes.
    """
    file = folder / CONFIG_FILE
    _refuse_kinds(config, file=file)
    rank, alpha, dropout = _numbers(config, file=file)
    targets = config.get("target_modules")
    layers, layers_pattern = config.get("layers_to_transform"), config.get("layers_pattern")
    if isinstance(targets, str) and (layers is not None or layers_pattern is not None):
        raise ConfigError(
            f"{file} has layers_to_transform or layers_pattern beside target_modules = {targets!r}; PEFT takes them with "
            "a list of names only. Put the layers into the regular expression."
        )
    if layers_pattern and layers is None:
        raise ConfigError(
            f"{file} has layers_pattern without layers_to_transform, as PEFT refuses it. Remove layers_pattern."
        )
    found = PeftConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        has_rslora=bool(config.get("use_rslora")),
        rank_pattern=_pattern(config, "rank_pattern", is_whole=True, file=file),
        alpha_pattern=_pattern(config, "alpha_pattern", is_whole=False, file=file),
        target_modules=_OF_A_LLAMA if targets is None else _names(config, "target_modules", file=file) or frozenset(),
        exclude_modules=_names(config, "exclude_modules", file=file),
        layers=_layers(layers, file=file),
        layers_pattern=_as_list(config, "layers_pattern", file=file),
        unfrozen=_unfrozen(config, file=file),
        tokens=_tokens(config.get("trainable_token_indices"), file=file),
        file=file,
    )
    _check_patterns(found, file=file)
    return found


def _is_named(module: str, names: frozenset[str]) -> bool:
    """Whether a name is the module's, or the end of it from a dot on."""
    parts = module.split(".")
    return any(".".join(parts[first:]) in names for first in range(len(parts)))


def _of_pattern(patterns: Iterable[tuple[Pattern, _Number]], module: str, default: _Number) -> _Number:
    """The number of the first pattern that matches."""
    return next((number for pattern, number in patterns if pattern.match(module)), default)


def _refuse_kinds(config: Mapping[str, Any], *, file: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{file} describes an adapter of type {config.get('peft_type')!r}; only LORA is supported.")
    unsupported = [f"{key} ({what})" for key, what in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias: {config['bias']} (trained biases)")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        unsupported.append(f"init_lora_weights: {start} (changes the base; let PEFT convert it when saving)")
    if unsupported:
        raise ConfigError(
            f"{file} asks for more than plain LoRA on the seven linears: {', '.join(unsupported)}. "
            "Such an adapter isn't supported."
        )


def _numbers(config: Mapping[str, Any], *, file: Path) -> tuple[int, float, float]:
    rank, alpha, dropout = config.get("r"), config.get("lora_alpha"), config.get("lora_dropout", 0.0)
    # Bounds from both sides: Python's JSON has NaN and infinity.
    is_dropout = isinstance(dropout, int | float) and not isinstance(dropout, bool) and 0 <= dropout <= 1
    if not (_is_rank(rank) and _is_alpha(alpha) and is_dropout):
        raise AdapterError(
            f"{file} has r = {rank!r}, lora_alpha = {alpha!r}, lora_dropout = {dropout!r}; "
            "a whole number from 1, a number above 0 and one from 0 to 1 were expected. The file is damaged."
        )
    assert rank is not None and alpha is not None
    return rank, float(alpha), float(dropout)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _is_alpha(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**63


def _pattern(config: Mapping[str, Any], setting: str, *, is_whole: bool, file: Path) -> dict[str, Any]:
    """``rank_pattern`` (whole numbers) or ``alpha_pattern``, in the file's order, by which PEFT takes the first match."""
    value = config.get(setting)
    if value is None:
        return {}
    is_number = _is_rank if is_whole else _is_alpha
    if not isinstance(value, dict) or not all(map(is_number, value.values())):
        raise AdapterError(
            f"{file} has {setting} = {short(value)}; names with {'whole numbers from 1' if is_whole else 'numbers above 0'} "
            "were expected. The file is damaged."
        )
    return value if is_whole else {name: float(number) for name, number in value.items()}


def _names(config: Mapping[str, Any], setting: str, *, file: Path) -> str | frozenset[str] | None:
    value = config.get(setting)
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return frozenset(value)
    raise AdapterError(
        f"{file} has {setting} = {short(value)}; a regular expression or a list of names was expected. The file is damaged."
    )


def _as_list(config: Mapping[str, Any], setting: str, *, file: Path) -> list[str]:
    names = _names(config, setting, file=file)
    return [names] if isinstance(names, str) else list(config[setting]) if names else []


def _layers(value: Any, *, file: Path) -> frozenset[int] | None:
    layers = [value] if type(value) is int else value
    if not layers:
        return None
    if not (isinstance(layers, list) and all(type(layer) is int for layer in layers)):
        raise AdapterError(
            f"{file} has layers_to_transform = {short(value)}; a list of layer numbers was expected. The file is damaged."
        )
    return frozenset(layers)


def _unfrozen(config: Mapping[str, Any], *, file: Path) -> tuple[str, ...]:
    """``modules_to_save``, which may name whole linears and norms of the layers, and the last norm."""
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and _MODULE.fullmatch(name) for name in names):
        raise AdapterError(
            f"{file} has modules_to_save = {short(names)}; a list of names was expected. The file is damaged."
        )
    others = [name for name in names if name.rpartition(".")[2] not in (*LINEARS, *NORMS)]
    if others:
        raise ConfigError(
            f"{file} asks for more than plain LoRA on the seven linears: modules_to_save (whole modules: {first_few(others)}; only "
            "linears and norms of the layers, and the last norm, may be whole). Such an adapter isn't supported."
        )
    return tuple(names)


def _tokens(value: Any, *, file: Path) -> tuple[int, ...]:
    """The tokens of ``trainable_token_indices``: ids, or ids by layer, where embedding and head must have the same."""
    by_layer = value if isinstance(value, dict) else {"embed_tokens": value or []}
    for ids in by_layer.values():
        if (
            not isinstance(ids, list)
            or not all(type(token) is int and token >= 0 for token in ids)
            or len(set(ids)) < len(ids)
        ):
            raise AdapterError(
                f"{file} has trainable_token_indices = {short(value)}; ids of tokens, each once, were expected. The file is damaged."
            )
    named = {name.removeprefix("model."): tuple(ids) for name, ids in by_layer.items() if ids}
    tokens = named.get("embed_tokens", ())
    if not named.keys() <= {"embed_tokens", "lm_head"} or any(ids != tokens for ids in named.values()):
        raise ConfigError(
            f"{file} has trainable_token_indices = {short(value)}: only rows of the embedding, and the same of the head, are "
            "supported. Such an adapter isn't."
        )
    return tokens


def _check_patterns(config: PeftConfig, *, file: Path) -> None:
    """Use every regular expression once on the first layer: a faulty one is reported here."""
    try:
        for names in (config.target_modules, config.exclude_modules):
            if isinstance(names, str):
                config._pattern(names)
        covered = config.modules([0])
        for module in covered or [module_path(LINEARS[0], layer=0)]:
            config.adapter_of(module)
            config._layer_of(module)
    except ConfigError:  # too slow; also a ValueError
        raise
    except (re.error, regex.error, OverflowError, RecursionError, IndexError, ValueError) as error:
        raise AdapterError(
            f"{file} has a name that isn't a regular expression ({error}). The file is damaged."
        ) from error


def refuse_other_models(config: PeftConfig, *, covered: Sequence[str], folder: Path) -> None:
    """Raise ``ConfigError`` for targets that can be on none of Llama's linears: another model's, or embeddings and head.

    Args:
        covered: the linears that have an adapter, as far as layers are known.
    """
    targets = config.target_modules
    names = [] if isinstance(targets, str) else sorted(targets)
    ends = [name for name in names if name.rpartition(".")[2] in ("lm_head", "embed_tokens")]
    if ends:
        raise ConfigError(
            f"{folder / CONFIG_FILE} has adapters on {first_few(ends)}: only those on Llama's seven linears "
            f"({' '.join(LINEARS)}) are supported."
        )
    if config.has_no_adapters:
        return
    if not covered and not config.modules(range(_MAX_LAYERS)):
        raise ConfigError(
            f"{folder / CONFIG_FILE} names target_modules {short(targets) if isinstance(targets, str) else first_few(names)}, "
            f"which match none of Llama's linears ({' '.join(LINEARS)}): it is another model's adapter, or mistyped."
        )
