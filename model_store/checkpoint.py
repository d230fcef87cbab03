"""Open a Hugging Face directory: its decoder, its tensors under canonical names, its tokenizer. Nothing in it is run.

This is where the parts meet and are compared: every tensor that config.json calls for must be there in its shape, and
no other. Weights are read when asked for, a few rows at a time, so memory never holds the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model_store.architectures import expected_shapes, read_spec, source_name
from model_store.config import Config, read_json
from model_store.errors import BadCheckpoint
from model_store.source_files import need_file
from model_store.spec import DecoderSpec
from model_store.tensors import Tensor, open_tensors, weight_files
from model_store.tokenizer_facts import TokenizerFacts, read_tokenizer_facts, tokenizer_files

CONFIG_FILE = "config.json"
MAX_PROBLEMS_SHOWN = 8
# Tables that old checkpoints stored although they follow from the configuration.
DERIVED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint. `tensors` by canonical name (architectures.py); valid inside open_checkpoint only."""

    directory: Path
    spec: DecoderSpec
    tokenizer: TokenizerFacts
    tensors: Mapping[str, Tensor]

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(tensor.shape)) for tensor in self.tensors.values())


def checkpoint_files(directory: Path) -> list[Path]:
    """Every file that decides what is imported, found but not read. Raises BadCheckpoint if one is missing."""
    return [need_file(directory, CONFIG_FILE), *tokenizer_files(directory).values(), *weight_files(directory)]


@contextmanager
def open_checkpoint(directory: Path) -> Iterator[Checkpoint]:
    """The checkpoint in `directory`. Raises BadCheckpoint: what is wrong, what was found, what was expected."""
    config = Config(read_json(need_file(directory, CONFIG_FILE)))
    spec, architecture = read_spec(config)
    tokenizer = read_tokenizer_facts(directory, config, spec.vocab_size)
    with open_tensors(directory) as found:
        names = {canonical: source_name(architecture, canonical) for canonical in expected_shapes(spec)}
        _compare(spec, names, found)
        _check_tie(spec, found, names["embed"], source_name(architecture, "lm_head"))
        yield Checkpoint(
            directory=directory,
            spec=spec,
            tokenizer=tokenizer,
            tensors={canonical: found[name] for canonical, name in names.items()},
        )


def _compare(spec: DecoderSpec, names: Mapping[str, str], found: Mapping[str, Tensor]) -> None:
    """One error for everything that is missing, of another shape, or not called for."""
    problems = []
    for canonical, shape in expected_shapes(spec).items():
        tensor = found.get(names[canonical])
        if tensor is None:
            problems.append(f"{names[canonical]} {list(shape)} is missing")
        elif tensor.shape != shape:
            problems.append(f"{names[canonical]} has shape {list(tensor.shape)}, expected {list(shape)}")
    known = set(names.values()) | ({"lm_head.weight"} if spec.tied_embeddings else set())
    problems += [
        f"{name} {list(found[name].shape)} is unexpected"
        for name in sorted(found)
        if name not in known and not name.endswith(DERIVED_SUFFIXES)
    ]
    if problems:
        more = f"; and {len(problems) - MAX_PROBLEMS_SHOWN:,} more" if len(problems) > MAX_PROBLEMS_SHOWN else ""
        shown = "; ".join(problems[:MAX_PROBLEMS_SHOWN])
        raise BadCheckpoint(f"the weights do not fit config.json ({spec.architecture}): {shown}{more}", param="weights")


def _check_tie(spec: DecoderSpec, found: Mapping[str, Tensor], embed: str, lm_head: str) -> None:
    """A tied checkpoint may still store its output layer, but not another one."""
    if not spec.tied_embeddings or lm_head not in found:
        return
    if found[lm_head].shape != found[embed].shape:
        raise BadCheckpoint(f"{lm_head} has shape {list(found[lm_head].shape)}; tied to {embed}", param=lm_head)
    for start in range(0, spec.vocab_size, 8192):
        rows = (start, min(start + 8192, spec.vocab_size))
        if not np.array_equal(found[lm_head].rows(*rows), found[embed].rows(*rows)):
            raise BadCheckpoint(
                f"config.json ties {lm_head} to {embed}, but their values differ in rows {rows[0]} to {rows[1]}",
                param="tie_word_embeddings",
            )
