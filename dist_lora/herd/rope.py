"""RoPE's settings in a config.json, of which several may state it: the ones that count are those that transformers takes.

Source: ``RotaryEmbeddingConfigMixin`` of transformers 5.23 (modeling_rope_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# transformers' defaults for a Llama (4.x and 5.23 alike)
THETA = 10_000.0
CONTEXT = 2048
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ORIGINAL = "original_max_position_embeddings"
_NAMES = ("rope_scaling", "rope_parameters")  # of transformers 4 and 5; the first that isn't empty counts


@dataclass(frozen=True)
class RopeScaling:
    """How Llama 3.1 and 3.2 scale RoPE's wavelengths (``rope_type: llama3``); contexts in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


def rope_name(config: Mapping[str, Any]) -> str:
    """The entry of a config that counts: ``rope_scaling``, unless it is empty; then ``rope_parameters``."""
    return next((name for name in _NAMES if config.get(name)), "rope_parameters")


def rope_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings in one mapping; what the entry that counts lacks is taken from the config itself.

    As in transformers ``rope_theta`` inside wins over the one beside it, ``original_max_position_embeddings`` beside it
    over the one inside; without either the latter is ``max_position_embeddings``.
    """
    stated = config.get(rope_name(config)) or {}
    rope = {"rope_theta": config.get("rope_theta", THETA), **stated}
    if "partial_rotary_factor" in config:
        rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if rope_type(rope) == "llama3":
        rope.setdefault(_ORIGINAL, config.get("max_position_embeddings") or CONTEXT)
        if _ORIGINAL in config:
            rope[_ORIGINAL] = config[_ORIGINAL]
    return rope


def rope_type(rope: Mapping[str, Any]) -> Any:
    """The kind of scaling: ``rope_type``, or ``type``, as it was called before transformers 4.43."""
    return rope.get("rope_type", rope.get("type", "default"))


def scaling_of(rope: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling in settings that ``unsupported_rope`` has nothing against; None where RoPE isn't scaled."""
    if rope_type(rope) == "default":
        return None
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_context=int(rope[_ORIGINAL]),
    )


def unsupported_rope(config: Mapping[str, Any]) -> list[str]:
    """Why the RoPE of this config can't be computed here; empty where it can."""
    name = rope_name(config)
    if not isinstance(config.get(name) or {}, Mapping):
        return [f"{name}: found {config[name]!r}, expected settings with rope_type"]
    rope = rope_of(config)
    nested = [key for key, value in rope.items() if isinstance(value, Mapping)]
    if nested:
        return [f"{name}: found settings for each of {nested}, expected one RoPE for all layers"]
    faults = []
    if rope_type(rope) not in ("default", "llama3"):
        faults.append(f"{name}.rope_type: found {rope_type(rope)!r}, expected 'default' or 'llama3'")
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial is not None and partial != 1.0:
        faults.append(f"partial_rotary_factor: found {partial}, expected 1.0")
    return faults


def rope_remarks(config: Mapping[str, Any]) -> list[str]:
    """What a supported config states twice and differently of RoPE, and which of it counts; and what it states in vain."""
    name, rope = rope_name(config), rope_of(config)
    stated: Mapping[str, Any] = config.get(name) or {}
    remarks = []
    other = config.get("rope_parameters")
    if name == "rope_scaling" and other and _plain(other) != _plain(stated):
        remarks.append(f"rope_scaling {stated} is used and rope_parameters {other} is not, as in transformers")
        if isinstance(other, Mapping) and other.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
            remarks.append(f"rope_theta is {rope['rope_theta']:g}, not the {other['rope_theta']} of rope_parameters")
    pairs = [
        ("rope_theta", config.get("rope_theta"), f"{name}.rope_theta", stated.get("rope_theta")),
        (f"{name}.type", stated.get("type"), f"{name}.rope_type", stated.get("rope_type")),
    ]
    if rope_type(rope) == "llama3":
        pairs.append((f"{name}.{_ORIGINAL}", stated.get(_ORIGINAL), _ORIGINAL, config.get(_ORIGINAL)))
    for loser, lost, winner, won in pairs:
        if None not in (lost, won) and lost != won:
            remarks.append(f"{winner} {won} is used and {loser} {lost} is not, as in transformers")
    used = {
        "rope_theta",
        "rope_type",
        "type",
        "partial_rotary_factor",
        *(SCALING if rope_type(rope) == "llama3" else ()),
    }
    unused = {key: value for key, value in stated.items() if key not in used and value is not None}
    if unused:
        remarks.append(f"{name} has {unused}, which RoPE of type {rope_type(rope)!r} doesn't use")
    return remarks


def _plain(stated: Any) -> Any:
    """Settings under one spelling, to compare two of them."""
    if not isinstance(stated, Mapping):
        return stated
    rest = {key: value for key, value in stated.items() if key not in ("type", "rope_type")}
    return {**rest, "rope_type": rope_type(stated)}
