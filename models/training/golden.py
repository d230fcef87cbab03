"""Write the golden set: held-out problems with one right answer each, the same number in every category.

python -m models.training.golden --out models/millpond/golden.jsonl
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from models.training.data import CHECKED
from models.training.example import Example

PER_CATEGORY = 45
MAX_TOKENS = 48  # the longest answer, seven numbers counted, has 27 tokens with its end


def golden_examples(seed: int, per_category: int) -> Iterator[tuple[str, Example]]:
    """Items with their ids; no problem appears twice, and none that training may see."""
    for category, (generate, _) in CHECKED.items():
        rng, keys = random.Random(f"golden {seed} {category}"), set[str]()
        while len(keys) < per_category:
            example = generate(rng)
            if example.is_held_out and example.key not in keys:
                keys.add(example.key)
                yield f"{category}-{len(keys):03d}", example


def as_line(identity: str, example: Example) -> str:
    item = {
        "id": identity,
        "category": example.category,
        "messages": [{"role": message.role, "content": message.content} for message in example.messages[:-1]],
        "answer": example.answer,
        "max_tokens": MAX_TOKENS,
    }
    return json.dumps(item, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--per-category", type=int, default=PER_CATEGORY)
    arguments = parser.parse_args()
    lines = [
        as_line(identity, example) for identity, example in golden_examples(arguments.seed, arguments.per_category)
    ]
    arguments.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} items in {len(CHECKED)} categories")


if __name__ == "__main__":
    main()
