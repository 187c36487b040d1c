"""Meta's own tokenizer of Llama 3, and the same as a folder that transformers reads."""

from __future__ import annotations

from pathlib import Path

import llama_models
import pytest
from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter


@pytest.fixture(scope="session")
def meta() -> MetaTokenizer:
    """Meta's own encoder."""
    return MetaTokenizer.get_instance()


@pytest.fixture(scope="session")
def llama3_folder(tmp_path_factory: pytest.TempPathFactory, meta: MetaTokenizer) -> Path:
    """Meta's tokenizer in the form that transformers reads."""
    file = Path(llama_models.__file__).parent / "llama3" / "tokenizer.model"
    converted = TikTokenConverter(vocab_file=str(file), extra_special_tokens=list(meta.special_tokens)).converted()
    folder = tmp_path_factory.mktemp("llama3")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converted, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    tokenizer.save_pretrained(folder)
    return folder
