"""An answer ends where the model's context does, and no prompt may fill it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dist_lora.chat.chat import ChatModel
from dist_lora.errors import ConfigError, TrainingError
from dist_lora.evaluation.generate import KeyValueCache, generate
from dist_lora.train.build import Trainee, open_base
from dist_lora.world.world import World
from tests.ranks.tiny import config_of, trainee_of

CONTEXT = 24


@pytest.fixture(scope="module")
def trainee(tiny_llama) -> Trainee:
    """A model that never ends an answer by itself."""
    trainee = trainee_of(config_of(tiny_llama("llama31")), World.alone())
    trainee.model.shape = dataclasses.replace(trainee.model.shape, context=CONTEXT)
    return trainee


@pytest.mark.parametrize("max_new_tokens", [3, 100])
def test_each_answer_of_a_batch_ends_at_the_context_of_its_own_prompt(trainee, max_new_tokens) -> None:
    prompts = [[65] * 20, [66] * 5, [67] * 23]
    answers = generate(trainee.model, prompts, stop_ids=frozenset(), max_new_tokens=max_new_tokens, world=World.alone())
    assert [len(answer) for answer in answers] == [min(max_new_tokens, CONTEXT - len(prompt)) for prompt in prompts]
    alone = [
        generate(trainee.model, [prompt], stop_ids=frozenset(), max_new_tokens=max_new_tokens, world=World.alone())[0]
        for prompt in prompts
    ]
    assert answers == alone, "those that have ended disturb no other"
    cache = KeyValueCache(trainee.model, [0, 20, 25], max_new_tokens=10**6)
    assert cache._keys[0].shape[2] == CONTEXT, "no more than can be used"


def test_a_prompt_whose_logits_are_no_numbers_is_an_error(trainee) -> None:
    weight = trainee.model.model.norm.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0] = float("nan")
        with pytest.raises(TrainingError, match="the logits of a prompt aren't finite numbers"):
            generate(
                trainee.model, [[65]], stop_ids=frozenset(), max_new_tokens=2, world=World.alone(), is_checked=True
            )
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_an_answer_that_the_context_ends_is_said_and_a_prompt_that_fills_it_refused(
    trainee, tiny_llama, caplog
) -> None:
    tokenizer = open_base(config_of(tiny_llama("llama31")), World.alone()).tokenizer
    model = ChatModel(trainee.model, tokenizer, frozenset(), 100)
    shown: list[str] = []
    model.complete("a" * 10, show=shown.append)
    assert [record.message for record in caplog.records] == [
        "the answer was ended at 13 tokens: the model's context is 24"
    ]
    with pytest.raises(ConfigError) as raised:
        model.complete("a" * 23, show=shown.append)
    assert str(raised.value) == (
        "the prompt has 24 tokens, and the model's context is 24 (max_position_embeddings in its config.json): no answer "
        "fits. Shorten the prompt, or begin a new chat"
    )
