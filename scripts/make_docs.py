"""Write the pages that repeat code: settings, metrics and errors in docs/. `--check` fails if one is stale."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from services.settings import PREFIX, Settings, describe_setting
from services.telemetry.table import TABLES
from wire.errors import MillraceError

DOCS = Path(__file__).resolve().parents[1] / "docs"
MADE = "Made by `python -m scripts.make_docs`; do not edit.\n"


def settings_page() -> str:
    rows = [
        f"| `{each.name}` | `{PREFIX}{each.name.upper()}` | `{each.default}` | {describe_setting(each.name)} |"
        for each in fields(Settings)
    ]
    head = """# Settings

A setting has one name: the key of a TOML file (`--config FILE` or `MILLRACE_CONFIG`), the environment variable, and the
flag (`--max-batch-tokens`). Flags win over the environment, the environment over the file; an unknown name refuses to
start.
"""
    return "\n".join([head, MADE, "| key | variable | default | meaning |", "|---|---|---|---|", *rows, ""])


def metrics_page() -> str:
    sections = []
    for process, specs in TABLES.items():
        rows = [f"| `{each.exposed}` | {each.kind} | {', '.join(each.labels)} | {each.meaning} |" for each in specs]
        sections += [f"\n## {process}\n", "| name | type | labels | meaning |", "|---|---|---|---|", *rows]
    head = """# Metrics

`vllm:` names are vLLM's, with its labels and meaning, so that dashboards and scaling rules made for it work here; ours
begin with `millrace_`. Served at `/metrics` on each process's port, or on a port of its own (`metrics_port`);
`millrace up` is gateway and worker in one. A scraper that accepts OpenMetrics gets exemplars with the trace id of
sampled requests (header `traceparent`) on the time to the first token and on the whole latency.

What the gateway says of the queue, of Redis and of workers it reads from the queue every 2 s, and it says so with no
worker there, so that the first can be started by it. Every gateway says the same: aggregate with `max`, never with
`sum`. What it could not read for 15 s is left out, and `millrace_queue_up` is 0.
"""
    return "\n".join([head, MADE.rstrip(), *sections, ""])


def _children(cls: type[MillraceError]) -> list[type[MillraceError]]:
    # Only the tree of the wire: other rooms have errors of their own, which no client meets.
    return [child for child in cls.__subclasses__() if child.__module__ == cls.__module__]


def errors_page() -> str:
    def rows(cls: type[MillraceError]) -> list[str]:
        retryable, meaning = "yes" if cls.retryable else "no", (cls.__doc__ or "").strip()
        line = f"| `{cls.code}` | {cls.http_status} | {retryable} | {meaning} |"
        return [line, *(row for child in _children(cls) for row in rows(child))]

    table = [row for child in _children(MillraceError) for row in rows(child)]
    head = """# Errors

Every error, on every route, frame and stream, has one shape:

```json
{"error": {"code": "...", "message": "...", "param": "...", "retryable": false, "request_id": "..."}}
```

`param` names the field, where one is to blame. `retryable` errors carry `Retry-After` where the time is known.
"""
    return "\n".join([head, MADE, "| code | status | retryable | meaning |", "|---|---|---|---|", *table, ""])


PAGES = {"settings.md": settings_page, "metrics.md": metrics_page, "errors.md": errors_page}


def stale_pages() -> list[str]:
    """The pages that differ from what the code says."""
    return [name for name, page in PAGES.items() if not (DOCS / name).is_file() or (DOCS / name).read_text() != page()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a page is stale")
    stale = stale_pages()
    if parser.parse_args().check:
        print(f"stale: {', '.join(stale)}; run python -m scripts.make_docs" if stale else "docs are as the code says")
        return 1 if stale else 0
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
