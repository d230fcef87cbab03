"""The shipped model as it is served (int8, batched, cached) answers its golden set about as well as in float."""

from __future__ import annotations

import json
from collections import Counter

from batcher.engine import Engine
from gateway.limits import GatewayLimits
from gateway.models import ServedModel
from services.loading import StoredModel
from services.model_commands import SHIPPED_DIRECTORY
from tests.shipped import shipped_backend
from wire.messages import Failed, Generate, Tokens

ENOUGH = 0.93  # float has at least 0.95 (models/millpond/README.md); int8 may lose a little


def test_the_quantized_model_keeps_its_golden_accuracy(shipped: StoredModel) -> None:
    model = ServedModel.load(shipped.directory, GatewayLimits())
    assert model.chat is not None
    items = [json.loads(line) for line in (SHIPPED_DIRECTORY / "golden.jsonl").read_text().splitlines()]
    backend = shipped_backend(blocks=1024, batch_tokens=512, batch_seqs=64)
    engine = Engine(backend)
    for item in items:
        prompt = model.tokenizer.encode(model.chat.render(item["messages"]), add_special_tokens=False)
        engine.add(Generate(item["id"], "m", prompt, item["max_tokens"], stop_token_ids=list(model.eos_token_ids)))
    answers: dict[str, list[int]] = {item["id"]: [] for item in items}
    while engine.has_work:
        for append in engine.step():
            assert not isinstance(append.event, Failed)
            if isinstance(append.event, Tokens):
                answers[append.event.request_id] += append.event.token_ids
    backend.close()
    wrong: Counter[str] = Counter()
    for item in items:
        text = model.tokenizer.decode(answers[item["id"]], skip_special_tokens=True)
        wrong[item["category"]] += text.strip() != item["answer"].strip()
    accuracy = 1 - wrong.total() / len(items)
    assert len(items) >= 600
    assert accuracy >= ENOUGH, f"{accuracy:.3f}; wrong by category: {wrong}"
