"""The model card of an adapter or a merged model: README.md, with the metadata that the hub reads. Needs no torch.

The metadata are those of ``huggingface_hub.ModelCardData`` (1.0 and newer). Nothing is guessed: a licence that isn't known
here is ``unknown``, and a number that the run didn't record isn't there. No path of this machine is in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from dist_lora.config.schema import LINEARS, ModuleAdapter
from dist_lora.herd.members import Member
from dist_lora.herd.models import member_of
from dist_lora.herd.unfrozen import describe_unfrozen
from dist_lora.lora.origin import ORIGIN_FILE, BaseIdentity, RunOrigin
from dist_lora.lora.run_facts import RunFacts, SetFacts, public_name
from dist_lora.text import count, ranges, span

CARD_FILE = "README.md"
_KINDS = {
    "chat": "by the chat template",
    "instruction": "as Stanford Alpaca's instructions",
    "text": "as plain text",
}
_VALUES = {
    "eval_loss": "held-out loss per trained token",
    "eval_perplexity": "held-out perplexity",
    "eval_exact_match": "held-out answers that match exactly",
}


@dataclass(frozen=True)
class Recipe:
    """What was adapted, and how. ``layers``: None where all of the model's are; ``tokens``: ids of those that were trained.

    ``unfrozen``: linears and norms whose whole weights were.
    """

    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    dropout: float
    targets: tuple[str, ...]
    layers: tuple[int, ...] | None
    num_linears: int
    tokens: tuple[int, ...] = ()
    unfrozen: tuple[str, ...] = ()

    @staticmethod
    def of(
        modules: Sequence[ModuleAdapter],
        *,
        dropout: float,
        layers: Sequence[int] | None,
        has_rslora: bool = False,
        tokens: Sequence[int] = (),
        unfrozen: Sequence[str] = (),
    ) -> Recipe:
        """The recipe of these adapters; with rsLoRA their alphas, which give the scale, aren't those of the file."""
        linears = {module.linear for module in modules}
        return Recipe(
            ranks=tuple(sorted({module.rank for module in modules})),
            alphas=tuple(sorted({module.alpha for module in modules})) if not has_rslora else (),
            dropout=dropout,
            targets=tuple(name for name in LINEARS if name in linears),
            layers=None if layers is None else tuple(layers),
            num_linears=len(modules),
            tokens=tuple(tokens),
            unfrozen=tuple(unfrozen),
        )


def card(
    kind: Literal["adapter", "merged"],
    *,
    base: BaseIdentity,
    recipe: Recipe,
    origin: RunOrigin,
    facts: RunFacts,
    software: Mapping[str, str],
    merged_quant: str | None = None,
) -> str:
    """The text of ``README.md``.

    Args:
        software: the versions that wrote the files; those that trained are in ``facts``.
        merged_quant: of a merged model, the base's values that the adapter was merged into.
    """
    name, member = public_name(base.name), member_of(base.name)
    hub_id = member.hub_id if member is not None else name if name and "/" in name else None
    title = _cell(hub_id or name or "a Llama")
    sections = [
        _head(kind, title, has_lora=recipe.num_linears > 0),
        *([_built_with(member)] if member is not None else []),
        _table("Data", _data(facts)),
        _table("Training", _training(recipe, origin, facts, merged_quant=merged_quant)),
        _table("Results", _results(facts)),
        _use(kind, title),
        _licence(member, title),
        _table("Software", list((dict(facts.versions) or dict(software)).items())),
    ]
    metadata = _metadata(kind, hub_id=hub_id, member=member, facts=facts)
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def licence_id(member: Member | None) -> str:
    """The hub's identifier of a base's licence: ``llama3.1`` and the like, ``unknown`` for a model that isn't a member."""
    match = re.fullmatch(r"(?:Meta )?Llama (\d(?:\.\d)?) Community License", member.licence) if member else None
    return f"llama{match[1]}" if match else "unknown"


def _metadata(kind: str, *, hub_id: str | None, member: Member | None, facts: RunFacts) -> dict[str, Any]:
    sets = [each for each in (facts.train, facts.held_out) if each is not None]
    datasets = list(dict.fromkeys(hub_id for each in sets for hub_id in each.hub_ids))
    named: dict[str, Any] = {} if hub_id is None else {"base_model": hub_id}
    if hub_id is not None and kind == "merged":
        named["base_model_relation"] = "finetune"
    named |= {
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "license": licence_id(member),
        "tags": ["llama", "lora"] if kind == "adapter" else ["llama"],
    }
    return named | ({"datasets": datasets} if datasets else {})


def _head(kind: str, title: str, *, has_lora: bool) -> str:
    adapter = "a LoRA adapter" if has_lora else "an adapter"
    if kind == "adapter":
        return f"# {adapter[0].upper()}{adapter[1:]} of {title}\n\nIt was trained by dist_lora. `{ORIGIN_FILE}` identifies the weights that it belongs to."
    return f"# {title}, with {adapter} merged into its weights\n\nThe adapter was trained and merged by dist_lora."


def _built_with(member: Member) -> str:
    # Licences of Llama 3 to 3.3, 1.b.i: this line, prominently, and the name of what is distributed begins so.
    maker = "Meta Llama 3" if member.licence.startswith("Meta ") else "Llama"
    return f"**Built with {maker}**"


def licence_remark(member: Member | None, repository: str) -> str:
    """What the licence asks of a repository's name (1.b.i of Llama 3 to 3.3), if that name doesn't do it; else ""."""
    first = "" if member is None else "llama-3" if member.licence.startswith("Meta ") else "llama"
    if re.sub(r"[ _.]", "-", repository.rpartition("/")[2].lower()).startswith(first):
        return ""
    assert member is not None
    shown = "Llama 3" if first == "llama-3" else "Llama"
    return f"{repository}: the {member.licence} (1.b.i) asks that the name of a model that is passed on begins with {shown!r}"


def _data(facts: RunFacts) -> list[tuple[str, str]]:
    rows = [("trained on", facts.train), ("held out", facts.held_out)]
    return [(what, _set(each)) for what, each in rows if each is not None]


def _set(each: SetFacts) -> str:
    counts = [
        count(number, noun) for number, noun in ((each.samples, "sample"), (each.tokens, "token")) if number is not None
    ]
    counts += [f"{each.target_tokens:,} of them trained on"] if each.target_tokens is not None else []
    return ", ".join(each.names or ("a part of the training data",)) + (f" ({', '.join(counts)})" if counts else "")


def _training(
    recipe: Recipe, origin: RunOrigin, facts: RunFacts, *, merged_quant: str | None
) -> Iterator[tuple[str, str]]:
    settings = facts.settings
    if recipe.num_linears:
        yield "rank", span(recipe.ranks)
        if recipe.alphas:
            yield "alpha", span(recipe.alphas)
        yield "dropout", f"{recipe.dropout:g}"
        layers = "" if recipe.layers is None else f", layers {ranges(recipe.layers)}"
        yield "adapted", f"{' '.join(recipe.targets)}{layers}: {count(recipe.num_linears, 'linear layer')}"
    if recipe.unfrozen:
        yield "trained whole", describe_unfrozen(recipe.unfrozen)
    if recipe.tokens:
        yield "trained tokens", f"{ranges(recipe.tokens)}: their rows of the embedding, and of a head of its own"
    names = {
        "optim.lr": "learning rate", "optim.schedule": "schedule", "optim.warmup_steps": "warm-up steps",
        "optim.weight_decay": "weight decay", "optim.max_grad_norm": "gradients clipped to norm",
        "train.global_batch": "sequences per step", "train.sequence_length": "tokens per sequence, at most",
        "train.packing": "packing", "train.seed": "seed", "data.train_on": "trained on",
    }  # fmt: skip
    yield from ((what, _value(settings[name])) for name, what in names.items() if name in settings)
    quant = origin.quant or settings.get("model.quant")
    if quant is not None:
        yield "base in", "its published values" if quant == "none" else str(quant)
    if merged_quant is not None:
        yield (
            "merged into",
            "the base's published values" if merged_quant == "none" else f"the base's values in {merged_quant}",
        )
    if origin.kinds:
        yield "prompts", ", ".join(_KINDS.get(kind, kind) for kind in origin.kinds)
    if "chat" in origin.kinds and "data.chat_template" in settings:
        yield "chat template", str(settings["data.chat_template"] or "the tokenizer's")


def _value(value: object) -> str:
    if value is None:
        return "no"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _results(facts: RunFacts) -> Iterator[tuple[str, str]]:
    if facts.step is not None:
        of_all = f" of {facts.num_steps:,}" if facts.num_steps not in (None, facts.step) else ""
        yield "steps", f"{facts.step:,}{of_all}"
    if facts.tokens is not None:
        targets = "" if facts.target_tokens is None else f", {facts.target_tokens:,} of them trained on"
        yield "tokens, with repetitions", f"{facts.tokens:,}{targets}"
    after = "" if facts.evaluated_step in (None, facts.step) else f" (after step {facts.evaluated_step:,})"
    for key, value in facts.evaluation.items():
        name, _, of_set = key.partition("/")
        shown = f"{value:.1%}" if name == "eval_exact_match" else f"{value:.4g}"
        yield _VALUES.get(name, name) + (f", {of_set}" if of_set else "") + after, shown


def _use(kind: str, title: str) -> str:
    if kind == "merged":
        loaded = 'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")'
        imported = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    else:
        loaded = (
            f'base = AutoModelForCausalLM.from_pretrained("{title}", dtype="auto")\n'
            'model = PeftModel.from_pretrained(base, "FOLDER")'
        )
        imported = "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
    tokenizer = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    return (
        f"## Use\n\nFOLDER is this one, or its name on the hub.\n\n```python\n{imported}\n\n{loaded}\n{tokenizer}\n```"
    )


def _licence(member: Member | None, title: str) -> str:
    if member is None:
        return f"## Licence\n\nThe base's licence isn't known here: look up that of {title} before you pass this on."
    return f"## Licence\n\nThe base's: {member.licence}. See https://huggingface.co/{member.hub_id}."


def _table(heading: str, rows: Iterator[tuple[str, str]] | Sequence[tuple[str, str]]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join([f"## {heading}", "", "| | |", "|---|---|", *lines]) if lines else ""


def _cell(text: str) -> str:
    """Without what would end a cell, or begin a tag or a link of its own."""
    return re.sub(r"([|<>\[\]`*\\])", r"\\\1", " ".join(text.split()))
