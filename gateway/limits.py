"""What the gateway accepts, in numbers: one frozen object that the composition root fills from its settings.

Apart from the schemas because these are an operator's choices; what the wire itself can carry is bounded in
schemas.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """Bounds on requests, streams and sockets. All numbers are positive, unless 0 is given a meaning."""

    max_body_bytes: int = 1 << 20  # of an HTTP request, counted as it arrives
    max_body_s: float = 30.0  # from its first byte to its last
    max_messages: int = 512  # in one conversation
    max_stop_strings: int = 8
    max_stop_bytes: int = 64  # UTF-8 bytes of one stop string
    max_stop_token_ids: int = 64
    default_max_tokens: int = 256  # when a request names none; less where less fits the context
    inline_chars: int = 4_096  # longer texts are rendered and tokenized in a thread
    text_threads: int = 2  # threads for those
    template_budget_s: float = 0.25  # one rendering of a chat template
    keep_alive_s: float = 15.0  # silence on a stream before a comment is sent
    cancel_grace_s: float = 2.0  # a stream without a reader runs on this long; 0 = not at all
    max_stall_s: float = 30.0  # a reader that takes nothing for this long is cut
    ws_max_frame_bytes: int = 1 << 20
    ws_max_requests: int = 64  # running at once on one socket
    ws_max_bad_frames: int = 16  # then the socket is closed with 1008
    allowed_hosts: frozenset[str] = frozenset()  # host names without port that may be asked for; empty = any
    allowed_origins: frozenset[str] = frozenset()  # of web pages that may open a socket; empty = none

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and (value < 0 or (value == 0 and field.name != "cancel_grace_s")):
                raise ValueError(f"GatewayLimits.{field.name} is {value}; it must be positive")
