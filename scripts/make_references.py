"""Write tests/model_store/references/: what transformers computes, in float32, from the test checkpoints.

    python -m scripts.make_references            needs the parity extra (torch, transformers)

Run after adding a case to tests/model_store/checkpoints.py. Kept out of the tests so that they need no torch.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.model_store.checkpoints import CASES, REFERENCES, ROWS_KEPT, StoredReference, digest, prompts, save_reference
from tests.parity.transformers_logits import open_transformers


def main() -> int:
    REFERENCES.mkdir(exist_ok=True)
    for path in REFERENCES.glob("*.npz"):
        path.unlink()
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            spec = case.write(directory)
            logits = open_transformers(directory)
            kept = [logits(prompt)[-ROWS_KEPT:] for prompt in prompts(spec.vocab_size)]
            save_reference(name, StoredReference(digest(directory), kept))
        print(f"{name}: {(REFERENCES / f'{name}.npz').stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
