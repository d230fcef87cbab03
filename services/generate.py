"""`millrace generate`: one answer from a model of the store, without a server, through the same engine that serves."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from batcher.engine import Engine
from gateway.limits import GatewayLimits
from gateway.models import ServedModel
from services.loading import find_model, open_backend, open_engine
from services.settings import Settings
from wire.errors import BadRequest, error_from_code
from wire.messages import Failed, Finished, Generate, SamplingParams, Tokens


@dataclass(frozen=True, slots=True)
class Question:
    """What the command line asked."""

    model: str
    prompt: str | None
    is_raw: bool
    input_ids: list[int] | None
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    ignore_eos: bool


def generate(settings: Settings, question: Question, *, as_json: bool) -> int:
    """Print the answer: its text as it comes, or with `as_json` one document with token_ids and finish_reason."""
    stored = find_model(settings, question.model)
    model = ServedModel.load(stored.directory, GatewayLimits())
    request = _request(question, model)
    engine = open_engine(settings, open_backend(settings, stored))
    engine.add(request, (), 1)
    token_ids, finished = _run(engine, model, show=not as_json)
    if as_json:
        answer = {
            "token_ids": token_ids,
            "finish_reason": finished.reason,
            "text": model.tokenizer.decode(token_ids, skip_special_tokens=True),
            "prompt_tokens": finished.usage.prompt_tokens,
            "completion_tokens": finished.usage.completion_tokens,
        }
        print(json.dumps(answer))
    return 0


def _request(question: Question, model: ServedModel) -> Generate:
    for name in ("temperature", "top_p", "min_p"):
        value = getattr(question, name)
        if not 0 <= value <= (100 if name == "temperature" else 1):
            raise BadRequest(
                f"--{name.replace('_', '-')} is {value}; expected 0 to {100 if name == 'temperature' else 1}"
            )
    if question.input_ids is not None:
        prompt_ids = question.input_ids
    elif question.is_raw or model.chat is None:
        prompt_ids = model.tokenizer.encode(question.prompt or "", add_special_tokens=True)
    else:
        text = model.chat.render([{"role": "user", "content": question.prompt or ""}])
        prompt_ids = model.tokenizer.encode(text, add_special_tokens=False)
    if not prompt_ids:
        raise BadRequest("the prompt has no tokens")
    return Generate(
        request_id="generate",
        model=model.model_id,
        prompt_ids=prompt_ids,
        max_tokens=question.max_tokens,
        sampling=SamplingParams(
            temperature=question.temperature,
            top_k=question.top_k,
            top_p=question.top_p,
            min_p=question.min_p,
            seed=question.seed,
        ),
        stop_token_ids=[] if question.ignore_eos else list(model.eos_token_ids),
    )


def _run(engine: Engine, model: ServedModel, *, show: bool) -> tuple[list[int], Finished]:
    token_ids: list[int] = []
    stream = model.tokenizer.detokenizer()
    while engine.has_work:
        for append in engine.step():
            match append.event:
                case Tokens() as event:
                    token_ids += event.token_ids
                    if show:
                        print("".join(map(stream.push, event.token_ids)), end="", flush=True)
                case Finished() as event:
                    if show:
                        print(stream.flush())
                    return token_ids, event
                case Failed() as event:
                    raise error_from_code(event.code)(event.message)
    print("the engine stopped without a last word; this is a bug", file=sys.stderr)
    raise SystemExit(1)
