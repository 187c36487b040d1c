"""What the config of an adapter's run says of it, whatever lies there in its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lora.lora.origin import RunOrigin, origin_of

CONFIG = "model: {name: org/x}\ndata: {train: a, format: FORMAT, chat_template: TEMPLATE}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CONFIG.replace("FORMAT", "text").replace("TEMPLATE", "llama3"), RunOrigin("org/x", "none", "llama3", True)),
        (CONFIG.replace("FORMAT", "messages").replace("TEMPLATE", "null"), RunOrigin("org/x", "none", None, False)),
        (CONFIG.replace("FORMAT", "messages").replace("TEMPLATE", "7"), RunOrigin("org/x", "none", None, False)),
        ("model: " + "[" * 5000, RunOrigin()),
        ("a: [", RunOrigin()),
        ("7", RunOrigin()),
        ("model: 7\ndata: {}", RunOrigin()),
        ("!!python/object/apply:os.getcwd []", RunOrigin()),
    ],
)
def test_a_config_beside_an_adapter_is_used_where_it_is_one(tmp_path: Path, text: str, expected: RunOrigin) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert origin_of(tmp_path / "adapter") == expected


def test_an_adapter_without_a_run_has_no_origin(tmp_path: Path) -> None:
    assert origin_of(tmp_path / "adapter") == RunOrigin()
