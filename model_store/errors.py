"""What can go wrong between a checkpoint and a stored model, as a branch of the tree in wire/errors.py.

MillraceError
├── BadRequest
│   └── BadCheckpoint     400  the source directory is not something we import: file, value and limit in the message
├── NotFound
│   └── UnknownModel      404  (wire.errors) no such name or revision in the store
├── Conflict              409  (wire.errors) this revision is stored already with other bytes
└── ModelStoreError       500
    ├── BadArtifact       500  a stored file is missing, changed, linked, or names what it must not
    └── ParityError       500  the artifact's logits are too far from the checkpoint's

Apart from wire/errors.py because none of these travels in a stream: they answer `millrace models import` and `verify`.
"""

from __future__ import annotations

from wire.errors import BadRequest, MillraceError


class BadCheckpoint(BadRequest):
    """The source is not a checkpoint we can import; `param` names the file or the key."""

    code = "bad_checkpoint"


class ModelStoreError(MillraceError):
    """Base of what is wrong with an artifact of ours."""

    code = "model_store"


class BadArtifact(ModelStoreError):
    """A stored artifact is not what its manifest says, or reaches outside its directory."""

    code = "bad_artifact"


class ParityError(ModelStoreError):
    """The artifact computes something else than the checkpoint it came from."""

    code = "parity"
