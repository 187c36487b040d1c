"""The hub, as one rank asks it, once; and whether a run would need it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dist_lora.base.hub import UNWANTED, WANTED
from dist_lora.base.index import open_index
from dist_lora.config.schema import Config
from dist_lora.doctor.findings import Answer
from dist_lora.errors import ConfigError, WeightsError
from dist_lora.herd.models import resolve_model

ANSWER_S = 5.0


def examine_hub(environment: Mapping[str, str], config: Config | None, *, timeout_s: float = ANSWER_S) -> Answer:
    """Whether the hub can be reached, by the client that a run uses, and whether ``config``'s model lies here."""
    from huggingface_hub import constants, get_session

    lacking = "" if config is None else _lacking(config)
    needs = f"; {lacking} is not whole in the cache" if lacking else ""
    answer = Answer(facts={"endpoint": constants.ENDPOINT, "is_reached": None, "lacking": lacking})
    if constants.HF_HUB_OFFLINE:
        if lacking:
            todo = f"Unset HF_HUB_OFFLINE, or fetch it on a machine with a network: hf download {lacking}"
            answer.add("fault", "hub", f"not asked, since HF_HUB_OFFLINE is set{needs}", todo)
        else:
            answer.add("ok", "hub", "not asked, since HF_HUB_OFFLINE is set")
        return answer
    try:
        status = (
            get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=timeout_s).status_code
        )
        why = f"it answers with status {status}" if status >= 500 else ""
    except Exception as error:  # the HTTP library's own kinds
        why = " ".join(str(error).split()) or type(error).__name__
    answer.facts["is_reached"] = not why
    if not why:
        answer.add("ok", "hub", f"{constants.ENDPOINT} answers{needs and needs + ', and will be fetched'}")
        return answer
    has_proxy = any(environment.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    answer.add(
        "fault" if lacking else "warning",
        "hub",
        f"{constants.ENDPOINT} can't be reached ({why}){needs}",
        "Fetch models on a machine with a network and give their folder as model.name"
        f"{'' if has_proxy else ', or set HTTPS_PROXY'}. Where all lies here or in the cache, set HF_HUB_OFFLINE=1: "
        "nothing then waits for an answer.",
    )
    return answer


def _lacking(config: Config) -> str:
    """The hub id of the config's model, where it is to come from the hub and is not whole in the cache; else empty."""
    from huggingface_hub import snapshot_download

    try:
        resolved = resolve_model(config.model.name)
    except (ConfigError, WeightsError):
        return ""  # `plan` and `train` say what is wrong with it
    if resolved.folder is not None or config.model.shape is not None or resolved.hub_id is None:
        return ""
    try:
        folder = snapshot_download(
            resolved.hub_id, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED), local_files_only=True
        )
        open_index(Path(folder), allow_bytes=True)
    except Exception:  # the library's own kinds where nothing is there, ours where a file of it is not
        return resolved.hub_id
    return ""
