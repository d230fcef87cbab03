"""On the real kernels: a given answer is as likely token by token, among others, as computed step by step alone."""

from __future__ import annotations

from batcher.engine import Engine
from batcher.likelihood import logprob
from gateway.limits import GatewayLimits
from gateway.models import ServedModel
from services.backends.onnxruntime import OnnxRuntimeBackend
from services.model_commands import SHIPPED_DIRECTORY
from services.prober.golden import Question, questions, read_golden
from tests.backends import Chunk, forward
from tests.shipped import shipped_backend, shipped_model
from wire.messages import Finished, Generate, SamplingParams
from wire.queue import Append


def alone(backend: OnnxRuntimeBackend, question: Question) -> float:
    """All before it read in one piece, for each token anew."""
    total = 0.0
    for count, token_id in enumerate(question.forced_ids):
        known = [*question.prompt_ids, *question.forced_ids[:count]]
        blocks = list(range(-(-len(known) // backend.limits.block_size)))
        total += logprob(forward(backend, [Chunk(known, 0, len(known), blocks)]).logits[0], token_id)
    return total


def test_the_likelihood_of_golden_answers_is_the_models_to_the_last_bit() -> None:
    model = ServedModel.load(shipped_model().directory, GatewayLimits())
    asked = [each for each in questions(read_golden(SHIPPED_DIRECTORY / "golden.jsonl", 6), model) if each.forced_ids]
    engine = Engine(shipped_backend(batch_tokens=32))
    appends: list[Append] = []
    for number, question in enumerate(asked):
        noise = SamplingParams(temperature=1.0, seed=number)
        engine.add(Generate(f"noise-{number}", model.model_id, question.prompt_ids[:9], 20, sampling=noise))
        appends += engine.step()
        forced = list(question.forced_ids)
        engine.add(Generate(question.item, model.model_id, question.prompt_ids, len(forced), forced_ids=forced))
    while engine.has_work:
        appends += engine.step()
    ends = [each.event for each in appends if isinstance(each.event, Finished)]
    found = {end.request_id: end.logprob for end in ends}
    backend = shipped_backend(batch_tokens=256)
    for question in asked:
        expected = alone(backend, question)
        assert found[question.item] == expected
        assert -2.0 * len(question.forced_ids) < expected < 0.0  # it knows most of them
