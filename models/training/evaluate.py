"""Greedy accuracy of a checkpoint directory on a golden set, in float, with transformers.

An answer is right when it equals the expected text after both are stripped. The stored weights are evaluated, widened
to float32; every other build of the model is measured against this.

    python -m models.training.evaluate --model models/millpond
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase


class GreedyModel(Protocol):
    """The one method used of a transformers model, whose own annotation does not accept it."""

    def generate(self, **options: object) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Item:
    identity: str
    category: str
    messages: list[dict[str, str]]
    answer: str
    max_tokens: int


def read_golden(path: Path) -> list[Item]:
    items = []
    for line in path.read_text(encoding="utf-8").splitlines():
        raw = json.loads(line)
        items.append(Item(raw["id"], raw["category"], raw["messages"], raw["answer"], raw["max_tokens"]))
    return items


@torch.no_grad()
def answer(
    model: GreedyModel, tokenizer: PreTrainedTokenizerBase, chats: list[list[dict[str, str]]], max_tokens: int
) -> list[str]:
    """Greedy answers to a batch of conversations, padded on the left."""
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=max_tokens, do_sample=False
    )
    texts: list[str] = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def evaluate(directory: Path, items: list[Item], batch_size: int) -> list[tuple[Item, str]]:
    """Every item with the model's answer."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = cast(GreedyModel, LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32))
    ordered = sorted(items, key=lambda item: sum(len(message["content"]) for message in item.messages))
    answered = []
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        texts = answer(model, tokenizer, [item.messages for item in batch], max(item.max_tokens for item in batch))
        answered += list(zip(batch, texts, strict=True))
    return answered


def summary(answered: list[tuple[Item, str]]) -> dict[str, tuple[int, int]]:
    """Category to (right, all)."""
    counted: dict[str, list[bool]] = defaultdict(list)
    for item, text in sorted(answered, key=lambda pair: pair[0].category):
        counted[item.category].append(text == item.answer.strip())
    return {category: (sum(results), len(results)) for category, results in counted.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/millpond"))
    parser.add_argument("--golden", type=Path, help="default: golden.jsonl in the model's directory")
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--wrong", action="store_true", help="also list the wrong answers")
    arguments = parser.parse_args()
    answered = evaluate(
        arguments.model, read_golden(arguments.golden or arguments.model / "golden.jsonl"), arguments.batch_size
    )
    table = summary(answered)
    right, total = sum(r for r, _ in table.values()), len(answered)
    if arguments.json:
        shares = {category: r / n for category, (r, n) in table.items()}
        print(json.dumps({"accuracy": right / total, "right": right, "items": total, "categories": shares}))
        return
    for category, (r, n) in table.items():
        print(f"{category:12} {r:4} / {n:<4} {r / n:7.1%}")
    print(f"{'all':12} {right:4} / {total:<4} {right / total:7.1%}")
    if arguments.wrong:
        for item, text in answered:
            if text != item.answer.strip():
                print(f"{item.identity}: {item.messages[-1]['content']!r} -> {text!r}, expected {item.answer!r}")


if __name__ == "__main__":
    main()
