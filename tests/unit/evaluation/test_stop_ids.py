"""Which ids end an answer, from files that may be damaged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_lora.errors import WeightsError
from dist_lora.evaluation.generate import stop_ids_of

TOKENIZER = SimpleNamespace(eos_token_id=7, get_vocab=lambda: {"<|eot_id|>": 8, "a": 1})


@pytest.mark.parametrize(("eos", "expected"), [(None, {7, 8}), (3, {3, 7, 8}), ([3, 4], {3, 4, 7, 8}), ([], {7, 8})])
def test_the_ids_of_both_files_and_of_the_tokenizer_end_an_answer(
    tmp_path: Path, eos: object, expected: set[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    assert stop_ids_of(tmp_path, TOKENIZER) == expected


def test_what_ends_a_text_ends_an_answer_though_the_models_own_end_is_another(tmp_path: Path) -> None:
    vocabulary = {"<|endoftext|>": 0, "<|im_end|>": 2, "a": 3}
    assert stop_ids_of(tmp_path, SimpleNamespace(eos_token_id=2, get_vocab=lambda: vocabulary)) == {0, 2}


@pytest.mark.parametrize("eos", ["x", [[1]], {"a": 1}, [1.5]])
def test_an_id_that_is_none_is_damage(tmp_path: Path, eos: object) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(WeightsError) as caught:
        stop_ids_of(tmp_path, TOKENIZER)
    assert f"{file} has eos_token_id {eos!r}, expected an id or a list of ids" in str(caught.value)
    file.write_text("[" * 100_000)
    with pytest.raises(WeightsError, match=r"generation_config\.json is damaged: it is not JSON"):
        stop_ids_of(tmp_path, TOKENIZER)
