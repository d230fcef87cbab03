"""A text file -> the token id sequences that ranges are measured on, by the checkpoint's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_store.source_files import need_file
from wire.errors import BadRequest

MAX_FILE_BYTES: Final = 4 << 20
MOST_SEQUENCES: Final = 16
SEQUENCE_TOKENS: Final = 512
FEWEST_TOKENS: Final = 64  # of which a range says something


def read_calibration(path: Path, source_dir: Path, max_model_len: int) -> list[NDArray[np.int64]]:
    """Up to 16 sequences of up to 512 tokens from the UTF-8 text in `path`. Raises BadRequest, BadCheckpoint."""
    from tokenizers import Tokenizer

    try:
        raw = path.read_bytes()[: MAX_FILE_BYTES + 1]
    except OSError as error:
        raise BadRequest(f"cannot read calibration text {path}: {error.strerror}", param="calibration") from error
    if len(raw) > MAX_FILE_BYTES:
        raise BadRequest(f"calibration text {path.name} has more than {MAX_FILE_BYTES:,} bytes", param="calibration")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"calibration text {path.name} is not UTF-8: {error}", param="calibration") from error
    tokenizer = Tokenizer.from_file(str(need_file(source_dir, "tokenizer.json")))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
    if len(ids) < FEWEST_TOKENS:
        raise BadRequest(
            f"calibration text {path.name} has {len(ids)} tokens; at least {FEWEST_TOKENS} are needed",
            param="calibration",
        )
    length = min(SEQUENCE_TOKENS, max_model_len)
    sequences = [ids[start : start + length] for start in range(0, len(ids), length)]
    return sequences[:MOST_SEQUENCES]
