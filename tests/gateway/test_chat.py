"""Chat templates are other people's programs: rendered in a sandbox, in bounds."""

from __future__ import annotations

import pytest

from gateway.chat import ChatTemplate
from tests.gateway.support import served_model
from wire.errors import BadRequest

HELLO = [{"role": "user", "content": "Hello"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>"}, budget_s=5.0)


def test_the_shipped_template_renders_a_conversation() -> None:
    chat = served_model().chat
    assert chat is not None
    messages = [{"role": "system", "content": "Be brief."}, *HELLO]
    assert chat.render(messages) == "<|bos|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"


def test_a_template_refuses_in_its_own_words() -> None:
    chat = served_model().chat
    assert chat is not None
    with pytest.raises(BadRequest, match="unknown role: pirate") as caught:
        chat.render([{"role": "pirate", "content": "Arr"}])
    assert caught.value.param == "messages"


def test_content_is_text_and_never_a_template() -> None:
    rendered = template("{{ messages[0].content }}").render([{"role": "user", "content": "{{ 7 * 7 }}"}])
    assert rendered == "{{ 7 * 7 }}"


@pytest.mark.parametrize("source", ["{{ 'x' | center(1000000000) }}", "{% for %}", "{{ messages | nothing }}"])
def test_what_is_no_template_is_refused_when_the_model_is_loaded(source: str) -> None:
    with pytest.raises(ValueError, match="not a chat template"):
        template(source)


def test_numbers_can_still_be_multiplied() -> None:
    assert template("{{ 6 * 7 }} {{ 7 % 4 }}").render(HELLO) == "42 3"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 'x' * 1000000000 }}",
        "{{ 2 ** 1000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'x'.center(1000000000) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% include 'other' %}",
        "{{ undefined.attribute }}",
    ],
)
def test_what_a_sandbox_must_refuse_is_refused_when_the_model_is_loaded(source: str) -> None:
    with pytest.raises(ValueError, match="the chat template refuses"):
        template(source)


def test_an_endless_rendering_is_cut_by_time() -> None:
    source = "{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match=r"more than .* characters or 0.05 s"):
        ChatTemplate(source, {}, budget_s=0.05)


def test_loop_controls_and_tojson_work_as_in_transformers() -> None:
    source = "{%- for m in messages -%}{{ m | tojson }}{%- break -%}{%- endfor -%}"
    assert template(source).render([{"role": "user", "content": "<ü>"}]) == '{"role": "user", "content": "<ü>"}'
