"""Token ids of a whole data set: made once, by all ranks together, cached by content.

The work is split without a collective: every rank encodes a contiguous part and reports it through the
world's key-value store, where no watchdog times out. The first rank of each cache joins the parts and
publishes the folder by one rename, under a lock that the kernel releases when the process dies. So a job
that is killed leaves nothing that a later one takes for complete, and of two concurrent jobs the second
waits and reads what the first has published.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import uuid
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import xxhash

from dist_lora.data.chat import Encoded, TrainOn, check_template, encode_sample
from dist_lora.data.columns import Reading
from dist_lora.data.guard import GuardRules
from dist_lora.data.guard_ids import encode_judged
from dist_lora.data.own_format import SETTING, own_format
from dist_lora.data.records import Format, named_format
from dist_lora.data.sources import Faults, Records, hash_sources, read_records, states_of
from dist_lora.data.token_set import SampleCounts, TokenSet
from dist_lora.errors import ConfigError, DataError, ReadError, SaveError, cannot_write
from dist_lora.files import lock, new_file, sync
from dist_lora.own_code import hash_of, is_own
from dist_lora.pace import pace
from dist_lora.text import count

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dist_lora.world.world import World

Which = str
"""The setting of a set in ``data``: ``train``, ``eval``, or ``eval.NAME`` of several held-out sets."""

CACHE_VERSION = 3
"""Part of every key: raise it whenever the same record may become other ids."""

REPORT_EVERY_S = 10.0
MAX_REPORTED = 50  # kinds of what isn't used, of one data set
FEW = 3  # truncated samples; more are a warning

log = logging.getLogger("dist_lora")
_ARRAYS = {
    "ids": np.dtype(np.uint32),
    "is_target": np.dtype(np.bool_),
    "lengths": np.dtype(np.int64),
    "num_targets": np.dtype(np.int64),
    "sample_ids": np.dtype(np.int64),
}


@dataclass(frozen=True)
class TokenRules:
    """The settings, by their names, that ids and targets depend on besides text and tokenizer.

    ``format`` may be the path of a user's own; the key of the cache then also holds the hash of its module.
    """

    sequence_length: int
    format: Literal["auto"] | Format | str = "auto"
    train_on: TrainOn = "assistant"
    on_no_target: Literal["error", "drop"] = "error"
    on_too_long: Literal["truncate", "drop", "error"] = "truncate"
    readings: tuple[Reading, ...] = ()  # of each source, where ``format`` alone doesn't say how all are read
    guard: GuardRules | None = None  # of format guard

    def recipe(self) -> dict[str, Any]:
        """What the key of the cache holds of them; what isn't used is left out, so that earlier caches stay valid."""
        given = {"readings": bool(self.readings), "guard": self.guard is not None}
        return {name: value for name, value in asdict(self).items() if given.get(name, True)}


def default_cache_dir() -> Path:
    """``$DIST_LORA_CACHE``, else ``~/.cache/dist_lora``."""
    return Path(os.environ.get("DIST_LORA_CACHE") or Path.home() / ".cache" / "dist_lora")


def prepare_tokens(
    names: str | Sequence[str],
    *,
    which: Which,
    rules: TokenRules,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_hash: str,
    cache_dir: Path | None,
    world: World,
    vocab: int | None = None,
) -> TokenSet:
    """The data set as token ids, from the cache or made now. All ranks call it, once for each ``which``.

    The key of the cache holds the bytes of the sources, the tokenizer with its template, and the
    rules. A second start encodes nothing.

    Args:
        names: files or hub ids, as ``read_records`` takes them.
        tokenizer_hash: by ``hash_tokenizer``.
        cache_dir: None for ``default_cache_dir()``. Nodes may share it or each have their own.
        vocab: rows of the model's embedding, for records of ids; None checks none.

    Raises:
        DataError: sources can't be read, records are invalid, samples have no target (or are too long)
            and the rules say error, or no sample is left. On every rank: its own or as RankError.
        SaveError: the cache can't be written.
    """
    started = time.monotonic()
    world.progress.now(f"reading data.{which}", kind="long")
    cache = _cache_folder(cache_dir)
    key, states = _agree_on_key(
        names, which=which, rules=rules, tokenizer_hash=tokenizer_hash, cache=cache, world=world
    )
    group = _group_of(cache, which=which, world=world)
    with contextlib.ExitStack() as held:
        building = _begin(cache / key, group=group, which=which, world=world, held=held)
        if building is not None:
            world.progress.now(f"tokenizing data.{which}", kind="long")
            builder = _Builder(names, which, rules, tokenizer, building, group, world, vocab, states)
            builder.encode_part()
        else:
            builder = None
        world.agree(f"tokenizing data.{which}", builder.error if builder else None)
        error = builder.publish(cache / key) if builder and group.is_first else None
        world.agree(f"publishing the tokens of data.{which}", error)
    token_set = _open_published(cache / key)
    assert token_set is not None, f"{cache / key} was published and can't be read"
    if world.is_first:
        how = "from the cache" if building is None else f"tokenized in {time.monotonic() - started:.1f} s"
        counts = _counts_of(cache / key)
        log.info(f"data.{which}: {_summary_line(counts, token_set, rules)}, {how}")
        if counts.num_truncated > FEW:
            log.warning(f"data.{which}: {_truncated_line(counts, rules)}")
        for line in counts.padding:
            log.info(f"data.{which}: {line}")
        for line in _reported(counts):
            log.warning(f"data.{which}: {line}")
    return token_set


def _cache_folder(cache_dir: Path | None) -> Path:
    try:
        return (cache_dir or default_cache_dir()).expanduser() / "tokens"
    except RuntimeError as error:  # of pathlib: there is no home, or no such user
        raise ConfigError(f"data.cache_dir: {cache_dir or '~/.cache'}: {error}. Set it to a writable folder") from None


@dataclass(frozen=True)
class _Group:
    """The ranks that share one cache: all of the world, or those of a node."""

    first: int  # world rank
    index: int  # of this rank in the group
    size: int

    @property
    def is_first(self) -> bool:
        return self.index == 0


@dataclass
class _Counts:
    """What happened to the samples of one part, or of all parts."""

    num_samples: int = 0
    num_documents: int = 0
    num_truncated: int = 0
    num_cut_answers: int = 0  # samples that were cut within a part that is trained on
    num_lost_answers: int = 0  # samples whose whole parts that are trained on begin beyond the cut
    broken: Faults = field(default_factory=Faults)
    too_long: Faults = field(default_factory=Faults)
    no_target: Faults = field(default_factory=Faults)
    kinds: list[str] = field(default_factory=list)
    reported: dict[str, int] = field(default_factory=dict)  # what records have and training doesn't use: samples
    padding: list[str] = field(default_factory=list)  # of all sources, counted by the first part alone

    def extend(self, other: _Counts) -> None:
        self.num_samples += other.num_samples
        self.num_documents += other.num_documents
        self.num_truncated += other.num_truncated
        self.num_cut_answers += other.num_cut_answers
        self.num_lost_answers += other.num_lost_answers
        self.broken.extend(other.broken)
        self.too_long.extend(other.too_long)
        self.no_target.extend(other.no_target)
        self.kinds = sorted({*self.kinds, *other.kinds})
        for what, number in other.reported.items():
            self.report(what, number)
        self.padding += other.padding

    def report(self, what: str, number: int = 1) -> None:
        if what in self.reported or len(self.reported) < MAX_REPORTED:
            self.reported[what] = self.reported.get(what, 0) + number

    def plain(self) -> SampleCounts:
        """As the token set has them."""
        return SampleCounts(
            num_samples=self.num_samples,
            num_truncated=self.num_truncated,
            num_cut_answers=self.num_cut_answers,
            num_lost_answers=self.num_lost_answers,
            num_too_long=self.too_long.count,
            num_without_targets=self.no_target.count,
            unused=dict(self.reported),
        )

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(text: bytes) -> _Counts:
        raw = json.loads(text)
        return _Counts(
            num_samples=raw["num_samples"],
            num_documents=raw["num_documents"],
            num_truncated=raw["num_truncated"],
            num_cut_answers=raw.get("num_cut_answers", 0),  # a cache of an earlier version doesn't have them
            num_lost_answers=raw.get("num_lost_answers", 0),
            broken=Faults(**raw["broken"]),
            too_long=Faults(**raw["too_long"]),
            no_target=Faults(**raw["no_target"]),
            kinds=list(raw["kinds"]),
            reported=dict(raw["reported"]),
            padding=list(raw.get("padding", [])),
        )


def _agree_on_key(
    names: str | Sequence[str],
    *,
    which: Which,
    rules: TokenRules,
    tokenizer_hash: str,
    cache: Path,
    world: World,
) -> tuple[str, list[list[int]]]:
    """The key of the cache, the same on all ranks, and the state of this node's sources before they were read for it.

    One rank of each node reads the sources' bytes.

    Raises:
        DataError: a source can't be read, or differs between nodes.
    """
    stage = f"reading data.{which}"

    def make() -> bytes:
        cache.mkdir(parents=True, exist_ok=True)
        states = states_of(names, which=which)
        recipe = [CACHE_VERSION, hash_sources(names, which=which), tokenizer_hash, rules.recipe()]
        if is_own(rules.format):
            recipe.append(hash_of(rules.format, setting=SETTING))
        key = xxhash.xxh3_128_hexdigest(json.dumps(recipe, sort_keys=True).encode())
        return json.dumps([key, states]).encode()

    made = world.once_per_node(stage, make, os_error=lambda error: _unwritable(cache, error))
    key, states = json.loads(made)
    first = world.once(stage, key.encode).decode()

    def compare() -> None:
        if key != first:
            raise DataError(
                f"data.{which}: {names} (or the tokenizer's files, or a format of your own) differ between this node, that of rank "
                f"{world.world_rank}, and the first. Give every node the same files"
            )

    world.agree_on(stage, compare)
    return key, states


def _group_of(cache: Path, *, which: Which, world: World) -> _Group:
    """The ranks that share the cache: every rank looks for a file that the first one writes."""
    everyone = _Group(first=0, index=world.world_rank, size=world.world_size)
    if world.local_size == world.world_size:
        return everyone

    stage = f"finding the ranks that share the cache of data.{which}"
    with world.probe(cache, stage, os_error=lambda error: _unwritable(cache, error)) as probe:
        is_seen_by_all = world.min(world.fresh_key("tokens/probe"), int(probe.exists())) == 1
    if is_seen_by_all:
        return everyone
    return _Group(first=world.world_rank - world.local_rank, index=world.local_rank, size=world.local_size)


def _begin(folder: Path, *, group: _Group, which: Which, world: World, held: contextlib.ExitStack) -> Path | None:
    """The folder in which the group builds, or None if the tokens are already cached.

    The group's first rank holds the lock until ``held`` is closed.
    """

    def begin() -> bytes:
        with world.progress.phase(f"waiting for another job that tokenizes data.{which}", kind="unseen"):
            has_lock = held.enter_context(_locked(folder.with_name(f"{folder.name}.lock")))
        is_cached = _open_published(folder) is not None
        leftovers = folder.parent.glob(f"{folder.name}.building-*")  # of jobs that were killed
        for stale in [*leftovers, *([] if is_cached else [folder])] if has_lock else []:
            shutil.rmtree(stale, ignore_errors=True)
        if is_cached:
            return b""
        building = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex}")
        building.mkdir()
        return building.name.encode()

    once = world.once if group.size == world.world_size else world.once_per_node
    name = once(
        f"opening the cache for data.{which}", begin, os_error=lambda error: _unwritable(folder.parent, error)
    ).decode()
    return folder.with_name(name) if name else None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds the lock file, after any other job that builds the same; yields False on a disk without locks."""
    with path.open("ab") as file:
        reported = time.monotonic()

        def report() -> None:
            nonlocal reported
            if time.monotonic() - reported > REPORT_EVERY_S:
                reported = time.monotonic()
                log.info(f"another job is tokenizing the same data; waiting for it ({path})")

        try:
            lock(file.fileno(), on_wait=report)
        except OSError:
            yield False  # without locks two jobs both do the work; the rename still makes the result complete
        else:
            yield True


class _Builder:
    """Makes the tokens of one group: each rank a part, the first rank the whole."""

    def __init__(
        self,
        names: str | Sequence[str],
        which: Which,
        rules: TokenRules,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        group: _Group,
        world: World,
        vocab: int | None,
        states: list[list[int]],
    ) -> None:
        self._states = states
        self._names, self._which, self._rules, self._tokenizer = names, which, rules, tokenizer
        self._folder, self._group, self._world, self._vocab = folder, group, world, vocab
        self._counts = _Counts()
        self._set_starts: tuple[int, ...] = ()
        self.error: Exception | None = None

    def encode_part(self) -> None:
        """Writes this rank's part; sets ``error``: on the first rank to the faults of all parts."""
        try:
            self._counts = self._encode()
        except (DataError, ReadError) as error:
            self.error = error
        except OSError as error:
            self.error = _unwritable(self._folder, error)
        counts = self._gathered()
        if self.error is None and self._group.is_first:
            self.error = _error_of(counts, which=self._which, rules=self._rules)

    def publish(self, folder: Path) -> Exception | None:
        """Joins the parts and renames the result to ``folder``; returns the error, if any."""
        whole = self._folder / "whole"
        try:
            whole.mkdir()
            for name in _ARRAYS:
                _join([self._folder / f"{index}.{name}" for index in range(self._group.size)], whole / name)
            sizes = {name: (whole / name).stat().st_size for name in _ARRAYS}
            summary = json.loads(self._counts.to_json())
            with new_file(whole / "summary.json") as append:
                starts = {"set_starts": self._set_starts} if self._set_starts else {}
                append(json.dumps({"sizes": sizes, "counts": summary, **starts}).encode())
            sync(whole)
            try:
                whole.rename(folder)
                sync(folder.parent)
            except OSError:
                if _open_published(folder) is None:
                    raise  # else another job, on a disk without locks, was faster
            shutil.rmtree(self._folder, ignore_errors=True)
        except OSError as error:
            return _unwritable(folder.parent, error)
        return None

    def _gathered(self) -> _Counts:
        """The counts of all parts on the first rank of the group, to which every other rank sends its own."""
        prefix = f"tokens/{self._which}/counts"
        own = self._counts
        if not self._group.is_first:
            self._world.share(f"{prefix}/{self._world.world_rank}", own.to_json())
            return own
        for index in range(1, self._group.size):
            own.extend(_Counts.from_json(self._world.fetch(f"{prefix}/{self._group.first + index}")))
        return own

    def _encode(self) -> _Counts:
        rules = self._rules
        records = read_records(
            self._names,
            fmt=named_format(rules.format),
            which=self._which,
            is_fetched=True,
            readings=rules.readings,
            own=own_format(rules.format),
        )
        self._set_starts = records.starts[:-1] if rules.readings else ()
        check_template(self._tokenizer, formats=records.formats)
        group = self._group
        part = range(len(records) * group.index // group.size, len(records) * (group.index + 1) // group.size)
        counts = _Counts(padding=records.padding() if group.is_first else [])
        share = "" if group.size == 1 else f" (this rank's part, one of {group.size})"
        with contextlib.ExitStack() as opened:
            advance = opened.enter_context(pace(f"tokenizing data.{self._which}{share}", is_shown=self._world.is_first))
            files = {
                name: opened.enter_context((self._folder / f"{group.index}.{name}").open("wb")) for name in _ARRAYS
            }
            for done, index in enumerate(part, start=1):
                documents = _encode_one(
                    records, index, tokenizer=self._tokenizer, rules=rules, counts=counts, vocab=self._vocab
                )
                for document in documents:
                    _write(files, document, index)
                advance(done, len(part))
        if states_of(self._names, which=self._which) != self._states:
            raise ReadError(
                f"data.{self._which}: {self._names} changed while it was read: another program is writing it. Start again once "
                "that has ended"
            )
        return counts


def _encode_one(
    records: Records,
    index: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    counts: _Counts,
    vocab: int | None,
) -> list[Encoded]:
    """The documents of one record as the rules leave them: one at most, but for a Guard; counts what happened to each."""
    try:
        if rules.guard is not None:
            documents = encode_judged(records[index], tokenizer=tokenizer, rules=rules.guard, sample=index)
        else:
            record, fmt = records.converted(index)
            documents = [encode_sample(record, tokenizer=tokenizer, fmt=fmt, train_on=rules.train_on, vocab=vocab)]
    except DataError as error:
        counts.num_samples += 1
        counts.broken.add(f"{records.where(index)}: {error}")
        return []
    fitted = [_fit(document, where=records.where(index), rules=rules, counts=counts) for document in documents]
    return [document for document in fitted if document is not None]


def _fit(document: Encoded, *, where: str, rules: TokenRules, counts: _Counts) -> Encoded | None:
    """A document as the rules leave it, or None; counts what happened to it."""
    counts.num_samples += 1
    for what in document.reported:
        counts.report(what)
    num_tokens, limit = len(document.ids), rules.sequence_length
    if num_tokens > limit:
        if rules.on_too_long != "truncate":
            counts.too_long.add(f"{where}: {num_tokens:,} tokens")
            return None
        counts.num_truncated += 1
        cut, lost = _what_is_lost(document.is_target, limit)
        counts.num_cut_answers += cut
        counts.num_lost_answers += lost
    had_targets = any(document.is_target[1:])
    is_broken = document.kind == "guard" and num_tokens > limit  # a verdict comes last, and half of one is another one
    is_target = [False] * limit if is_broken else document.is_target[:limit]
    document = replace(document, ids=document.ids[:limit], is_target=is_target)
    if not any(document.is_target[1:]):
        reason = (
            f"its {num_tokens:,} tokens are truncated to train.sequence_length = {limit:,}, before "
            f"{'its verdict ends' if is_broken else 'the first target'}"
            if had_targets
            else "it has nothing to train on (no assistant turn, or all of them weight 0)"
        )
        counts.no_target.add(f"{where}: {reason}")
        return None
    counts.num_documents += 1
    if document.kind is not None and document.kind not in counts.kinds:
        counts.kinds.append(document.kind)
    return document


def _what_is_lost(is_target: Sequence[bool], limit: int) -> tuple[bool, bool]:
    """Whether the cut is within a part that is trained on, and whether such a part lies wholly beyond it."""
    is_within = bool(is_target[limit - 1] and is_target[limit])
    start = limit
    while is_within and start < len(is_target) and is_target[start]:
        start += 1
    return is_within, any(is_target[start:])


def _unwritable(path: Path, error: OSError) -> SaveError:
    return cannot_write(
        f"data.cache_dir: {path} can't be written: {error.strerror or error}. "
        "Set it to a writable folder with room for the tokens",
        error,
    )


def _join(parts: Sequence[Path], whole: Path) -> None:
    """Moves a file and appends others, each of which is gone then: the disk never holds the tokens twice."""
    parts[0].rename(whole)
    with whole.open("ab") as file:
        for path in parts[1:]:
            with path.open("rb") as part:
                shutil.copyfileobj(part, file, 2**20)
            path.unlink()
        file.flush()
        os.fsync(file.fileno())


def _write(files: Mapping[str, BinaryIO], document: Encoded, index: int) -> None:
    array("I", document.ids).tofile(files["ids"])
    array("B", document.is_target).tofile(files["is_target"])
    array("q", [len(document.ids)]).tofile(files["lengths"])
    array("q", [sum(document.is_target[1:])]).tofile(files["num_targets"])
    array("q", [index]).tofile(files["sample_ids"])


def _error_of(counts: _Counts, *, which: Which, rules: TokenRules) -> DataError | None:
    """All faults of the samples, in one error; None if the rules accept them."""
    messages = []
    total = counts.num_samples
    if counts.broken.count:
        messages.append(f"data.{which}: {counts.broken.count} of {total} records are broken:\n{counts.broken.listed()}")
    if counts.too_long.count and rules.on_too_long == "error":
        messages.append(
            f"data.{which}: {counts.too_long.count} of {total} samples are longer than "
            f"train.sequence_length = {rules.sequence_length}:\n{counts.too_long.listed()}\n"
            "Set data.on_too_long: truncate or drop, or a longer train.sequence_length."
        )
    if counts.no_target.count and rules.on_no_target == "error":
        way_out = (
            "Set data.on_no_target: drop to leave them out, or a longer train.sequence_length."
            if counts.no_target.count < total
            else "Nothing is left to train on: set a longer train.sequence_length, or fix the data."
        )
        messages.append(
            f"data.{which}: {counts.no_target.count} of {total} samples have no target tokens "
            f"({counts.no_target.count / total:.0%}):\n{counts.no_target.listed()}\n{way_out}"
        )
    if not messages and counts.num_documents == 0:
        faults = "\n".join(text for text in (counts.too_long.listed(), counts.no_target.listed()) if text)
        messages.append(
            f"data.{which}: none of {total} samples is left: {counts.too_long.count} are longer than "
            f"train.sequence_length = {rules.sequence_length}, "
            f"{counts.no_target.count} have no target tokens:\n{faults}"
        )
    return DataError("\n".join(messages)) if messages else None


def _open_published(folder: Path) -> TokenSet | None:
    """The tokens of a published folder; None if there is none, or its files aren't as written."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
        sizes, counts = summary["sizes"], _Counts.from_json(json.dumps(summary["counts"]).encode())
        if any((folder / name).stat().st_size != sizes[name] for name in _ARRAYS):
            return None
        arrays = {name: np.memmap(folder / name, dtype, "r") for name, dtype in _ARRAYS.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    starts = np.cumsum(arrays["lengths"])
    starts -= arrays["lengths"]
    plain = {name: np.asarray(array) for name, array in arrays.items()}  # slices of a memmap are slow to make
    return TokenSet(
        **plain,
        starts=starts,
        kinds=tuple(sorted(counts.kinds)),
        counts=counts.plain(),
        set_starts=tuple(summary.get("set_starts", ())),
    )


def _counts_of(folder: Path) -> _Counts:
    return _Counts.from_json(json.dumps(json.loads((folder / "summary.json").read_text())["counts"]).encode())


def _reported(counts: _Counts) -> list[str]:
    """What records have and training doesn't use, with the number of its samples; the most frequent first."""
    listed = sorted(counts.reported.items(), key=lambda item: -item[1])
    return [f"{what} (in {number:,} of {counts.num_samples:,} samples)" for what, number in listed]


def _truncated_line(counts: _Counts, rules: TokenRules) -> str:
    """What samples have lost by being truncated."""
    lost = [
        f"{number:,} lost {what}"
        for number, what in (
            (counts.num_cut_answers, "the end of an answer and its end token"),
            (counts.num_lost_answers, "a whole answer"),
        )
        if number
    ]
    return (
        f"{counts.num_truncated:,} of {counts.num_samples:,} samples were cut to sequence_length={rules.sequence_length}: "
        f"{', '.join(lost) or 'they lost text that is not trained on'}. A longer train.sequence_length keeps it; "
        "data.on_too_long: drop leaves them out"
    )


def _summary_line(counts: _Counts, token_set: TokenSet, rules: TokenRules) -> str:
    """Samples, tokens and what was dropped or truncated, as one line."""
    line = f"{count(len(token_set), 'sample')}, {count(token_set.num_tokens, 'token')}, {token_set.num_target_tokens:,} trained on"
    for faults, why in ((counts.too_long, "too long"), (counts.no_target, "without target tokens")):
        if faults.count:
            line += f"; dropped {faults.count:,} of {counts.num_samples:,} {why}"
    if 0 < counts.num_truncated <= FEW:
        line += f"; truncated {count(counts.num_truncated, 'sample')} to sequence_length={rules.sequence_length}"
    return line
