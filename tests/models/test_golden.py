"""The golden set of millpond: enough, balanced, right, and never seen in training."""

import json
import random
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from models.training.data import CHECKED, conversations, examples
from models.training.example import HELD_OUT_ONE_IN, held_out
from models.training.golden import as_line, golden_examples
from tests.models.checker import Messages, expected_answer

MILLPOND = Path(__file__).parents[2] / "models" / "millpond"


@dataclass(frozen=True, slots=True)
class Item:
    id: str
    category: str
    messages: Messages
    answer: str
    max_tokens: int


@pytest.fixture(scope="module")
def golden() -> list[Item]:
    lines = (MILLPOND / "golden.jsonl").read_text(encoding="utf-8").splitlines()
    return [Item(**json.loads(line)) for line in lines]


def prompt_of(messages: Messages) -> str:
    return json.dumps([[message["role"], message["content"]] for message in messages])


def test_golden_set_has_at_least_600_items_the_same_number_in_each_category(golden: list[Item]) -> None:
    counted = Counter(item.category for item in golden)
    assert len(golden) >= 600
    assert set(counted) == set(CHECKED)
    assert len(set(counted.values())) == 1


def test_golden_ids_and_prompts_are_unique(golden: list[Item]) -> None:
    assert len({item.id for item in golden}) == len(golden)
    assert len({prompt_of(item.messages) for item in golden}) == len(golden)


def test_golden_answers_agree_with_an_independent_checker(golden: list[Item]) -> None:
    wrong = [(item.id, item.answer) for item in golden if expected_answer(item.category, item.messages) != item.answer]
    assert wrong == []


def test_every_answer_fits_its_token_limit(golden: list[Item]) -> None:
    tokenizer = Tokenizer.from_file(str(MILLPOND / "tokenizer.json"))
    too_long = [item.id for item in golden if len(tokenizer.encode(item.answer).ids) + 1 > item.max_tokens]
    assert too_long == []


def test_golden_file_is_what_the_generator_writes(golden: list[Item]) -> None:
    per_category = len(golden) // len(CHECKED)
    written = [json.loads(as_line(identity, example)) for identity, example in golden_examples(1, per_category)]
    assert written == [
        json.loads(line) for line in (MILLPOND / "golden.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_every_golden_problem_is_held_out_by_the_rule(golden: list[Item]) -> None:
    per_category = len(golden) // len(CHECKED)
    keys = [(example.category, example.key) for _, example in golden_examples(1, per_category)]
    assert len(set(keys)) == len(golden)
    assert all(held_out(category, key) for category, key in keys)


@pytest.mark.parametrize("seed", [1, 7])
def test_training_examples_never_ask_a_golden_question(golden: list[Item], seed: int) -> None:
    prompts = {prompt_of(item.messages) for item in golden}
    seen = islice(examples(random.Random(seed)), 15_000)
    asked = {prompt_of([{"role": m.role, "content": m.content} for m in example.messages[:-1]]) for example in seen}
    assert prompts & asked == set()


def test_joined_conversations_never_contain_a_golden_single_turn(golden: list[Item]) -> None:
    single = {item.messages[0]["content"] for item in golden if len(item.messages) == 1}
    turns = (m for chat in islice(conversations(random.Random(3)), 8_000) for m in chat)
    assert not [message.content for message in turns if message.role == "user" and message.content in single]


def test_held_out_share_is_near_one_in_eight() -> None:
    share = sum(held_out("sum", f"{a} {b}") for a in range(100) for b in range(100)) / 10_000
    assert share == pytest.approx(1 / HELD_OUT_ONE_IN, abs=0.01)


def test_training_answers_agree_with_the_independent_checker() -> None:
    for example in islice(examples(random.Random(11)), 5_000):
        if example.category in CHECKED:
            messages = [{"role": message.role, "content": message.content} for message in example.messages[:-1]]
            assert expected_answer(example.category, messages) == example.answer, messages
