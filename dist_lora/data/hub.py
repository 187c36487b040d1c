"""A data set of the hub, loaded by ``datasets``; once downloaded, from its cache alone."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from dist_lora.data.columnar import LoadedRows
from dist_lora.data.json_text import first_line
from dist_lora.errors import DataError

HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<split>[\w.-]+))?")


def load_from_hub(name: str, which: str, *, suffixes: str, is_fetched: bool = False) -> LoadedRows:
    """The rows of ``ORG/NAME[:CONFIG][@SPLIT]``.

    Args:
        suffixes: of files that can be named instead, for the error.
        is_fetched: this node has read it before, so the hub isn't queried again.

    Raises:
        DataError: it can't be had; the message says why and what to do.
    """
    import datasets

    parts = HUB_ID.fullmatch(name)
    assert parts is not None, name
    split = parts["split"] or default_split(which)
    if is_fetched:
        # What can't be read back from the cache is requested again.
        with contextlib.suppress(Exception), _without_network():
            return LoadedRows(name, datasets.load_dataset(parts["name"], name=parts["config"], split=split))
    try:
        dataset = datasets.load_dataset(parts["name"], name=parts["config"], split=split)
    except Exception as error:
        raise DataError(_hub_error(name, parts["name"], split, which, error, suffixes)) from error
    return LoadedRows(name, dataset)


def default_split(which: str) -> str:
    """The split that ``data.train`` or ``data.eval`` reads where none is named."""
    return "train" if which == "train" else "validation"


@contextlib.contextmanager
def _without_network() -> Iterator[None]:
    """``datasets`` reads its cache without requests: otherwise each load costs ten requests per rank."""
    import datasets

    was_offline, verbosity = datasets.config.HF_HUB_OFFLINE, datasets.logging.get_verbosity()
    datasets.config.HF_HUB_OFFLINE = True
    datasets.logging.set_verbosity_error()  # it would warn that the hub can't be reached
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline
        datasets.logging.set_verbosity(verbosity)


def _hub_error(name: str, repo: str, split: str, which: str, error: Exception, suffixes: str) -> str:
    """The message for a data set that can't be loaded; ``datasets`` has many exceptions for few causes."""
    text = str(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds or any(sign in text for sign in ("gated", "401", "403")):
        return (
            f"data.{which}: {repo} is gated or private on the hub ({first_line(text)}). Request access on "
            f"https://huggingface.co/datasets/{repo}, then log in: `hf auth login`, or set HF_TOKEN"
        )
    if "Config name is missing" in text or "BuilderConfig" in text:
        return f"data.{which}: {repo} has several configs: {text.strip()}\nName one: data.{which}: {repo}:CONFIG"
    if "split" in text.lower():
        return f"data.{which}: {repo} has no split {split!r} ({first_line(text)}). Name one: {repo}@SPLIT"
    if "RepositoryNotFoundError" in kinds or "doesn't exist on the Hub" in text:
        return f"data.{which}: {name!r} is neither a file nor a data set of the hub. Check the name"
    return (
        f"data.{which}: the hub's data set {name!r} can't be read: {type(error).__name__}: "
        f"{first_line(text)}. Without a network, name a local file ({suffixes})"
    )
