"""The models this gateway answers for: what is needed to turn text into a request and events into text.

Built once from manifests. The gateway never opens a graph or weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.chat import ChatTemplate
from gateway.limits import GatewayLimits
from gateway.text import Tokenizer
from model_store.manifest import TOKENIZER_FILE, read_manifest
from wire.errors import UnknownModel


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model as the gateway sees it. `model_id` is what travels on the wire and what workers lease by."""

    name: str
    revision: str
    tokenizer: Tokenizer
    max_model_len: int  # context length in tokens
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    chat: ChatTemplate | None

    @property
    def model_id(self) -> str:
        return f"{self.name}@{self.revision}"

    @classmethod
    def load(cls, directory: Path, limits: GatewayLimits) -> ServedModel:
        """The artifact in `directory`. Raises FileNotFoundError, or ValueError with the reason."""
        manifest = read_manifest(directory)
        chat = None
        if manifest.chat_template is not None:
            chat = ChatTemplate(manifest.chat_template, manifest.special_tokens, budget_s=limits.template_budget_s)
        return cls(
            name=manifest.name,
            revision=manifest.revision,
            tokenizer=Tokenizer.from_file(directory / TOKENIZER_FILE),
            max_model_len=manifest.geometry.max_model_len,
            vocab_size=manifest.geometry.vocab_size,
            eos_token_ids=tuple(manifest.eos_token_ids),
            chat=chat,
        )


class Models:
    """Names to models. "millpond" is the first millpond given, "millpond@1f2e..." that revision and no other."""

    def __init__(self, served: Sequence[ServedModel]) -> None:
        if not served:
            raise ValueError("a gateway needs at least one model")
        self.served = tuple(served)
        self._by_name: dict[str, ServedModel] = {}
        for model in served:
            if model.model_id in self._by_name:
                raise ValueError(f"model {model.model_id} is given twice")
            self._by_name[model.model_id] = model
            self._by_name.setdefault(model.name, model)

    @classmethod
    def load(cls, directories: Sequence[Path], limits: GatewayLimits) -> Models:
        """Read the artifacts in these directories. Raises FileNotFoundError, or ValueError with the reason."""
        return cls([ServedModel.load(directory, limits) for directory in directories])

    def resolve(self, name: str | None) -> ServedModel:
        """The model that `name` means; without a name, the only one served. Raises UnknownModel."""
        if name is None and len(self.served) == 1:
            return self.served[0]
        model = None if name is None else self._by_name.get(name)
        if model is None:
            what = "name a model" if name is None else f"no model {name!r} here"
            raise UnknownModel(f"{what}; served: {', '.join(m.model_id for m in self.served)}", param="model")
        return model
