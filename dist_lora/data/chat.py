"""From one record to token ids and the loss mask of its targets.

Guarantees:

* The tokenizer's chat template is the authority. The ids of a chat are those of the whole rendered
  text encoded at once; for Llama-3 and plain turns they are Meta's own ``ChatFormat`` (of
  ``llama_models``) token for token.
* Only the template can write a special token. A special token's name inside a user's text, a tool's
  schema or an answer is encoded as ordinary text.
* Targets come from spans, message by message: an assistant's turn begins where the rendered
  conversation before it, with the generation prompt, ends, and it ends with its end token. Nothing
  is searched for in the text. A token that begins before the span is not a target: at inference the
  prompt already has it.
* A document begins with one BOS if the model has a BOS at all.
* The ids don't depend on the day: a template that asks for the date always gets the same one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from dist_lora.base.tokenizer_files import TOKENIZER_FILES, hash_tokenizer_files
from dist_lora.data.guard import Judged
from dist_lora.data.json_text import unpaired_surrogate
from dist_lora.data.left_out import LeftOutError, left_out_of
from dist_lora.data.pretokenized import Tokens, check_vocabulary, targets_of
from dist_lora.data.records import Chat, Continuation, Format, Instruction, read_sample, unused_columns
from dist_lora.data.template import BUNDLED, Renderer, Span, first_line, special_ids, special_pattern, template_source
from dist_lora.data.turns import Turn
from dist_lora.errors import DataError, WeightsError

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last", "all"]
SampleKind = Literal["chat", "instruction", "text", "guard"]

_MAX_TEMPLATE_BYTES = 2**20


@dataclass(frozen=True)
class Encoded:
    """A document: its ids and, for each, whether it is a target (part of the loss); ``reported``: what it leaves out.

    ``kind`` says how its prompt is written: by the chat template, as Stanford Alpaca's plain text, as it is, or as Llama Guard's;
    None for ids that were given, which don't say.
    """

    ids: list[int]
    is_target: list[bool]
    reported: tuple[str, ...] = ()
    kind: SampleKind | None = "chat"


def load_tokenizer(folder: Path, *, chat_template: str | None, text: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder, with the chat template that the run sets.

    Reads local files only and runs no code from the folder.

    Args:
        folder: a folder with ``tokenizer.json`` and the other tokenizer files.
        chat_template: None for the tokenizer's own, a name of ``BUNDLED`` for ours, a Jinja file, or a template itself.
        text: a template's text, in place of the tokenizer's own.

    Raises:
        WeightsError: the folder holds no readable tokenizer.
        DataError: the template's file is missing, or its special tokens are not in the vocabulary.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        _check_tokenizer(tokenizer)
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        present = sorted(name for name in TOKENIZER_FILES if (folder / name).exists())
        raise WeightsError(
            f"{folder}: the tokenizer can't be loaded "
            f"(files found: {', '.join(present) or 'none'}): {first_line(error)}. "
            "Fetch tokenizer.json and tokenizer_config.json of the model"
        ) from error
    if text is not None and chat_template is None:
        tokenizer.chat_template = text
        tokenizer.template_source = "the one that the adapter was trained with"
    if chat_template is not None:
        tokenizer.chat_template = _template_text(chat_template)
        named = "the text in the config" if _is_template(chat_template) else chat_template
        tokenizer.template_source = f"data.chat_template: {named}"
        lacking = [token for token in BUNDLED.get(chat_template, ()) if token not in special_ids(tokenizer)]
        if lacking:
            raise DataError(
                f"data.chat_template: {chat_template} needs the special tokens {', '.join(lacking)}, "
                f"which the tokenizer in {folder} lacks. Remove the setting to use the model's own"
            )
    return tokenizer


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a library in Rust, which isn't an ``Exception``."""
    return type(error).__module__ == "pyo3_runtime" and type(error).__name__ == "PanicException"


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ``ValueError`` unless the tokenizer returns token offsets and its template is a string."""
    template = tokenizer.chat_template
    templates = list(template.values()) if isinstance(template, dict) else [template]
    if not all(text is None or isinstance(text, str) for text in templates):
        raise ValueError(f"its chat_template is a {type(template).__name__}, and a string was expected")
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} has no token offsets; a fast tokenizer (tokenizer.json) was expected"
        )
    tokenizer("a", return_offsets_mapping=True)
    special_ids(tokenizer)


def hash_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """xxh3_128 over the tokenizer's files and the chat template in use."""
    digest = xxhash.xxh3_128(hash_tokenizer_files(folder).encode())
    digest.update(repr(tokenizer.chat_template).encode())
    return digest.hexdigest()


def encode_sample(
    record: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase,
    fmt: Format,
    train_on: TrainOn,
    vocab: int | None = None,
) -> Encoded:
    """Ids and targets of one record, not truncated.

    ``train_on`` chooses the targets of a chat: every assistant turn, the last one, or all tokens but
    the first. Turns that the record leaves out (``turns.TRAIN_FLAGS``) are never targets. In plain text
    everything after a prompt is a target; with ``all`` the prompt is too. A Guard's samples have several forms, see
    ``guard_ids.encode_judged``. Ids of a pretokenized record are taken as they are, and checked against a vocabulary of ``vocab``
    tokens; None checks none.

    Raises:
        DataError: the record isn't of format ``fmt``, or the template refuses it; the message doesn't
            include where the record is.
    """
    sample = read_sample(record, fmt=fmt)
    assert not isinstance(sample, Judged), "of format guard"
    kind: SampleKind = "text"
    if isinstance(sample, Instruction):
        kind = "instruction"
        sample = _instruction_as(sample, has_template=tokenizer.chat_template is not None)
    if isinstance(sample, Tokens):
        encoded = _encode_tokens(sample, tokenizer=tokenizer, train_on=train_on, vocab=vocab)
    elif isinstance(sample, Chat):
        encoded = _encode_chat(sample, tokenizer=tokenizer, train_on=train_on)
    else:
        encoded = replace(_encode_continuation(sample, tokenizer=tokenizer, train_on=train_on), kind=kind)
    unused = tuple(f"column {name!r} is not used" for name in unused_columns(record, fmt=fmt))
    return replace(encoded, reported=unused + encoded.reported) if unused else encoded


def _encode_tokens(
    sample: Tokens, *, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn, vocab: int | None
) -> Encoded:
    if vocab is not None:
        check_vocabulary(sample.ids, vocab=vocab)
    bos_id = _bos_id(tokenizer)
    begins_otherwise = bos_id is not None and sample.ids[0] != bos_id
    reported = (f"input_ids doesn't begin with the model's first token, {bos_id}",) if begins_otherwise else ()
    return Encoded(list(sample.ids), targets_of(sample, train_on=train_on), reported, kind=None)


def encode_prompt(
    messages: Sequence[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> list[int]:
    """The ids of a conversation up to the assistant's answer, as training saw them before an answer.

    ``beside``: what a record has beside its messages, ``tools``, ``builtin_tools`` and ``system``.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the turns.
    """
    answered = [*messages, {"role": "assistant", "content": "-"}]
    no_answer = DataError(f"the chat template ({template_source(tokenizer)}) doesn't write an assistant's answer")
    try:
        encoded = encode_sample({**beside, "messages": answered}, tokenizer=tokenizer, fmt="messages", train_on="last")
    except LeftOutError as error:
        if f"the text of the assistant turn {len(messages)}" in error.refused:
            raise no_answer from None
        raise
    if True not in encoded.is_target:
        raise no_answer
    return encoded.ids[: encoded.is_target.index(True)]


def encode_text(text: str, *, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a text to continue, as training saw the prompt of a completion."""
    sample = Continuation(prompt=text, completion="")
    return _encode_continuation(sample, tokenizer=tokenizer, train_on="assistant").ids[:-1]


def encode_instruction(text: str, *, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of an instruction in Stanford Alpaca's plain text, as training saw it without a chat template."""
    sample = _instruction_as(Instruction(text, "", ""), has_template=False)
    assert isinstance(sample, Continuation)
    return encode_text(sample.prompt, tokenizer=tokenizer)


def check_template(tokenizer: PreTrainedTokenizerBase, *, formats: Sequence[Format]) -> None:
    """Raises DataError if the data are chats and the tokenizer has no chat template."""
    if "messages" in formats and tokenizer.chat_template is None:
        raise DataError(
            "the data are conversations (format messages) and the model's tokenizer has no chat template. "
            f"Use the model's Instruct version, or set data.chat_template: {' | '.join(BUNDLED)} | FILE"
        )


def print_sample(
    ids: Sequence[int], is_target: Sequence[bool], *, tokenizer: PreTrainedTokenizerBase, title: str
) -> None:
    """Print a document under a title, with its targets in green, or between ⟦ and ⟧ where there is no colour."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(title)
    has_colour = console.color_system is not None
    console.print(render_sample(ids, is_target, tokenizer=tokenizer, has_colour=has_colour))


def render_sample(
    ids: Sequence[int], is_target: Sequence[bool], *, tokenizer: PreTrainedTokenizerBase, has_colour: bool
) -> Text:
    """A document as text to print: targets in green, or between ⟦ and ⟧ without colour.

    A newline that is a target is shown as ⏎ at the end of its line.
    """
    from rich.text import Text

    text = Text()
    for piece, is_trained in pieces_of(ids, is_target, tokenizer=tokenizer):
        if not is_trained:
            text.append(piece, style="dim" if has_colour else "")
        elif has_colour:
            text.append(piece.replace("\n", "⏎\n"), style="bold green")
        else:
            text.append("⟦" + piece.replace("\n", "⏎\n") + "⟧")
    return text


def pieces_of(
    ids: Sequence[int], is_target: Sequence[bool], *, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool]]:
    """The text of a document in pieces that are targets and pieces that aren't."""
    start = 0
    while start < len(ids):
        end = start
        while end < len(ids) and bool(is_target[end]) == bool(is_target[start]):
            end += 1
        yield str(tokenizer.decode(list(ids[start:end]), skip_special_tokens=False)), bool(is_target[start])
        start = end


def _is_template(chat_template: str) -> bool:
    """Whether the setting is no name of a file but the template itself, as a YAML file may hold it."""
    return "{{" in chat_template or "{%" in chat_template


def _template_text(chat_template: str) -> str:
    if chat_template in BUNDLED:
        return (Path(__file__).parent / "templates" / f"{chat_template}.jinja").read_text(encoding="utf-8")
    if _is_template(chat_template):
        return chat_template
    try:
        path = Path(chat_template).expanduser()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, an unknown home
        is_file = False
    if not is_file:
        raise DataError(f"data.chat_template: {chat_template} is neither a file nor one of {', '.join(BUNDLED)}")
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_TEMPLATE_BYTES + 1)
        if len(content) > _MAX_TEMPLATE_BYTES:
            raise DataError(f"data.chat_template: {chat_template} is longer than {_MAX_TEMPLATE_BYTES:,} bytes")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"data.chat_template: {chat_template}: not text in UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise DataError(f"data.chat_template: {chat_template} can't be read: {error.strerror or error}") from None


def _bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that a document begins with: Llama-3's, or the one that the tokenizer itself puts first."""
    llama_bos = special_ids(tokenizer).get("<|begin_of_text|>")
    if llama_bos is not None:
        return llama_bos
    bos_id = tokenizer.bos_token_id
    if isinstance(bos_id, int) and tokenizer.encode("a")[:1] == [bos_id]:
        return bos_id
    return None


def _end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends plain text: an Instruct model's eos ends a turn, so the name takes precedence."""
    special = special_ids(tokenizer)
    for name in ("<|end_of_text|>", "<|endoftext|>", tokenizer.eos_token):
        if isinstance(name, str) and name in special:
            return special[name]
    raise DataError(
        "the tokenizer has no token to end a text with (<|end_of_text|>, <|endoftext|> or an eos_token); "
        "the model would never learn to stop. Set eos_token in its tokenizer_config.json"
    )


def chat_of(sample: Instruction) -> Chat:
    """An instruction as a conversation: its history, the instruction with its input, and the answer."""
    question = f"{sample.instruction}\n\n{sample.input}" if sample.input else sample.instruction
    turns = [Turn("system", sample.system)] if sample.system else []
    for asked, answered in sample.history:
        turns += [Turn("user", asked), Turn("assistant", answered)]
    return Chat((*turns, Turn("user", question), Turn("assistant", sample.output)), sample.tools)


def _instruction_as(sample: Instruction, *, has_template: bool) -> Chat | Continuation:
    """A user's turn and its answer, or without a chat template Stanford Alpaca's own plain text."""
    if has_template:
        return chat_of(sample)
    beside = [name for name in ("system", "history", "tools") if getattr(sample, name)]
    if beside:
        raise DataError(
            f"{', '.join(beside)}: lost, since the model's tokenizer has no chat template, and an instruction in plain text has "
            f"no place for it. Use the model's Instruct version, or set data.chat_template: {' | '.join(BUNDLED)} | FILE"
        )
    context = ", paired with an input that provides further context" if sample.input else ""
    extra = f"### Input:\n{sample.input}\n\n" if sample.input else ""
    prompt = (
        f"Below is an instruction that describes a task{context}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{sample.instruction}\n\n{extra}### Response:\n"
    )
    return Continuation(prompt=prompt, completion=sample.output)


def _encode_continuation(sample: Continuation, *, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn) -> Encoded:
    """Prompt and completion are encoded separately: at inference there is only the prompt."""
    bos_id = _bos_id(tokenizer)
    prompt = [] if bos_id is None else [bos_id]
    prompt += [token for token, _ in encode_plain(sample.prompt, tokenizer)]
    completion = [token for token, _ in encode_plain(sample.completion, tokenizer)]
    completion.append(_end_of_text_id(tokenizer))
    is_target = [train_on == "all"] * len(prompt) + [True] * len(completion)
    is_target[0] = False
    return Encoded(ids=prompt + completion, is_target=is_target)


def _encode_chat(chat: Chat, *, tokenizer: PreTrainedTokenizerBase, train_on: TrainOn) -> Encoded:
    """A conversation: rendered once whole, and once or twice for each turn whose span is needed."""
    check_template(tokenizer, formats=("messages",))
    left_out = left_out_of(chat, tokenizer=tokenizer)
    if not left_out.asks_for_null:
        turns = tuple(replace(turn, content="") if turn.content is None else turn for turn in chat.turns)
        chat = replace(chat, turns=turns)
    chat, mark = _without_special_tokens(chat, tokenizer)
    render = Renderer(chat=chat, tokenizer=tokenizer)
    whole = render.upto(len(chat.turns))
    spans = _spans(render, whole, train_on=train_on)
    if left_out.refused:
        raise LeftOutError(left_out.refused, source=template_source(tokenizer))
    ids: list[int] = []
    is_target: list[bool] = []
    for token, start in _encode_rendered(whole, tokenizer=tokenizer, mark=mark):
        ids.append(token)
        is_target.append(any(span.start <= start < span.end for span in spans) != (train_on == "all"))
    bos_id = _bos_id(tokenizer)
    if bos_id is not None and ids[:1] != [bos_id]:
        ids, is_target = [bos_id, *ids], [False, *is_target]
    is_target[:1] = [False]
    return Encoded(ids, is_target, tuple(f"the chat template leaves out {what}" for what in left_out.reported))


def _spans(render: Renderer, whole: str, *, train_on: TrainOn) -> list[Span]:
    """The spans whose tokens are targets; for "all" those whose tokens are not."""
    chosen = _turns_to_mark(render.chat, train_on)
    marked = None if train_on == "all" else render.marked()
    if marked is None:
        return [render.span(index, whole) for index in chosen]
    answers = [index for index, turn in enumerate(render.chat.turns) if turn.role == "assistant"]
    if chosen == answers:
        return marked
    if len(marked) != len(answers):
        raise DataError(
            f"the chat template ({template_source(render.tokenizer)}) marks {len(marked)} spans as generated, and there are "
            f"{len(answers)} assistant turns: it can't be said which of them are to be left out. Set data.train_on: all, "
            "remove the flags of the turns, or set data.chat_template to another"
        )
    return [marked[answers.index(index)] for index in chosen]


def _turns_to_mark(chat: Chat, train_on: TrainOn) -> list[int]:
    """The turns whose tokens are targets; for "all" those whose tokens are not."""
    if train_on == "all":
        return [index for index, turn in enumerate(chat.turns) if not turn.is_trained]
    asked = [index for index, turn in enumerate(chat.turns) if turn.is_asked and turn.role != "assistant"]
    if asked:
        raise DataError(
            f"turn {asked[0]} is to be trained on by its flag, and its role is {chat.turns[asked[0]].role}: only an assistant's "
            "turns are trained on. Remove the flag, or set data.train_on: all"
        )
    answers = [index for index, turn in enumerate(chat.turns) if turn.role == "assistant"]
    if train_on == "last":
        answers = answers[-1:]
    return [index for index in answers if chat.turns[index].is_answer_to_learn]


def _without_special_tokens(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[Chat, str | None]:
    """The chat with each special token's name broken by a mark, and that mark; None if it holds none.

    The mark is one character that the chat doesn't contain. It goes after the name's first character,
    so that a template's own trimming and joining work as on the text itself.
    """
    special = special_pattern(tokenizer)
    strings = list(_strings([[turn.as_message() for turn in chat.turns], chat.tools, chat.builtin_tools]))
    if not any(special.search(text) for text in strings):
        return chat, None
    used = set().union(*strings, *special_ids(tokenizer))
    mark = next((chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in used), None)
    if mark is None:
        raise DataError("the record uses every private-use character, and one is needed to mark special tokens")

    def broken(value: Any) -> Any:
        if isinstance(value, str):
            while special.search(value):
                value = special.sub(lambda match: match[0][0] + mark + match[0][1:], value)
            return value
        if isinstance(value, dict):
            return {broken(key): broken(item) for key, item in value.items()}
        return [broken(item) for item in value] if isinstance(value, list | tuple) else value

    turns = tuple(
        replace(
            turn, content=broken(turn.content), tool_calls=tuple(broken(turn.tool_calls)), extras=broken(turn.extras)
        )
        for turn in chat.turns
    )
    return Chat(turns, tuple(broken(chat.tools)), tuple(broken(chat.builtin_tools))), mark


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _encode_rendered(text: str, *, tokenizer: PreTrainedTokenizerBase, mark: str | None) -> Iterator[tuple[int, int]]:
    """Each token of a rendered chat with the character at which it begins.

    With a mark in the text, the text is split at the template's special tokens; what is between them
    is encoded without its marks, as plain text and in one piece, so that its merges are those of plain text.
    """
    if mark is None:
        yield from _with_starts(text, tokenizer=tokenizer, is_plain=False)
        return
    ids_by_name = special_ids(tokenizer)
    position = 0
    for match in [*special_pattern(tokenizer).finditer(text), None]:
        piece = text[position : match.start() if match else len(text)]
        positions = [position + index for index, character in enumerate(piece) if character != mark]
        for token, start in encode_plain(piece.replace(mark, ""), tokenizer):
            yield token, positions[start]
        if match:
            yield ids_by_name[match[0]], match.start()
            position = match.end()


def encode_plain(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, int]]:
    """Each token of a text in which nothing is a special token, with the character at which it begins."""
    return _with_starts(text, tokenizer=tokenizer, is_plain=True) if text else iter(())


def _with_starts(text: str, *, tokenizer: PreTrainedTokenizerBase, is_plain: bool) -> Iterator[tuple[int, int]]:
    """Each token and its first character.

    A tokenizer that trims its offsets leaves out the space before a word, so a token begins at the
    latest where the one before it ended; the bytes of one character share that character's position.
    """
    if fault := unpaired_surrogate(text):
        raise DataError(fault)
    try:
        encoded = tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=is_plain,
            return_offsets_mapping=True,
            verbose=False,
        )
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise DataError(f"the tokenizer ({tokenizer.name_or_path}) can't encode it: {first_line(error)}") from error
    end_before = 0
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield token, min(start, end_before)
        end_before = end
