"""Whether the hub can be reached, tried once by one rank, and whether a run needs it."""

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
    """Whether the hub can be reached, by the client that a run uses, and whether ``config``'s model is on this host."""
    from huggingface_hub import constants, get_session

    missing = "" if config is None else _missing(config)
    needs = f"; {missing} isn't complete in the cache" if missing else ""
    answer = Answer(facts={"endpoint": constants.ENDPOINT, "is_reached": None, "lacking": missing})
    if constants.HF_HUB_OFFLINE:
        if missing:
            todo = f"Unset HF_HUB_OFFLINE, or download it on a machine with network access: hf download {missing}"
            answer.add("fault", "hub", f"not contacted, since HF_HUB_OFFLINE is set{needs}", todo)
        else:
            answer.add("ok", "hub", "not contacted, since HF_HUB_OFFLINE is set")
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
        answer.add("ok", "hub", f"{constants.ENDPOINT} answers{needs and needs + ', and will be downloaded'}")
        return answer
    has_proxy = any(environment.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    answer.add(
        "fault" if missing else "warning",
        "hub",
        f"{constants.ENDPOINT} can't be reached ({why}){needs}",
        "Download models on a machine with network access and set model.name to their folder"
        f"{'' if has_proxy else ', or set HTTPS_PROXY'}. If all files are local or in the cache, set HF_HUB_OFFLINE=1: "
        "nothing then waits for the hub.",
    )
    return answer


def _missing(config: Config) -> str:
    """The hub id of the config's model, if it comes from the hub and isn't complete in the cache; else empty."""
    from huggingface_hub import snapshot_download

    try:
        resolved = resolve_model(config.model.name)
    except (ConfigError, WeightsError):
        return ""  # ``plan`` and ``train`` report what is wrong with it
    if resolved.folder is not None or config.model.shape is not None or resolved.hub_id is None:
        return ""
    try:
        folder = snapshot_download(
            resolved.hub_id, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED), local_files_only=True
        )
        open_index(Path(folder), allow_bytes=True)
    except Exception:  # the library's own kinds where nothing is cached, ours where a file is missing
        return resolved.hub_id
    return ""
