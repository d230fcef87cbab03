"""The results as short tables for people; `--json` prints the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]


def table(rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they must be; the first is words, the rest are numbers. None is a dash."""
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    lines = []
    for first, *rest in texts:
        numbers = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    return "\n".join(lines)


def _text(cell: object) -> str:
    if cell is None:
        return "-"
    return f"{cell:,}" if isinstance(cell, int | float) else str(cell)


def soak_text(found: Results) -> str:
    idle = found["idle"]
    lines = [
        f"{found['seconds']:,} s with {found['active']} active streams, {idle['open_sockets']} idle sockets and"
        f" {idle['waiting_streams']} waiting streams",
        f"{found['answers']:,} answers, {found['tokens']:,} tokens ({found['tokens_per_s']:,}/s); answers with a wrong"
        f" token {found['wrong']}, errors {found['errors'] or 'none'}",
        f"idle clients lost {idle['lost'] or 'none'}; pings answered {idle['pings']:,}, keep-alives"
        f" {idle['keep_alives']:,}",
        "",
    ]
    times = [[f"ms, in {found['edge_s']:g} s", "first", "last"]]
    times += [[name.replace("_", " "), found["first"][name], found["last"][name]] for name in found["first"]]
    columns = {
        "RSS, MiB": "start_mib", "settled": "settled_mib", "end": "end_mib", "MiB/h": "mib_per_hour",
        "%/h": "percent_per_hour", "files": "files_before", "most": "files_most", "after": "files_after",
        "threads": "threads_before", "most ": "threads_most", "cores": "cores",
    }  # fmt: skip
    rows: list[list[object]] = [["process", *columns]]
    rows += [[name, *(row[key] for key in columns.values())] for name, row in found["processes"].items()]
    rows.append(["used_memory", *(found["redis"].get(key) for key in columns.values())])
    rows.append(["this client", *[None] * (len(columns) - 1), found["client_cores"]])
    return "\n".join([*lines, table(times), "", table(rows)])


def overload_text(found: Results) -> str:
    capacity = ", ".join(f"{row['clients']}: {row['good_per_s']:g}" for row in found["search"])
    peaks = ", ".join(f"{row['good_per_s']:g}" for row in found["peaks"])
    share, least, most = found["share_of_peak"]
    columns = {
        "offered/s": "offered_per_s", "good/s": "good_per_s", "late": "late", "not sent": "unsent",
        "no end": "unfinished", "refused p50, ms": "refusal_ms_p50", "p99, ms": "refusal_ms_p99",
        "client late p99, ms": "sent_late_ms_p99", "queue empty, s": "queue_empty_s",
        "as before, s": "ttft_as_before_s",
    }  # fmt: skip
    rows: list[list[object]] = [["round", *columns]]
    rows += [[str(number), *(row[key] for key in columns.values())] for number, row in enumerate(found["overloads"], 1)]
    lines = [
        f"capacity, answers/s in time by clients at once: {capacity}",
        f"max_queued_tokens {found['max_queued_tokens']:,} ({found['queue_s']:g} s of the capacity); deadline"
        f" {found['deadline_s']:g} s",
        f"before: first token p50 {found['calm']['ttft_ms_p50']} ms, p90 {found['calm']['ttft_ms_p90']} ms",
        f"peaks, {found['clients']} clients, answers/s in time: {peaks}",
        table(rows),
    ]
    for number, row in enumerate(found["overloads"], 1):
        cores = ", ".join(f"{name} {cores:g}" for name, cores in row["cores"].items())
        lines.append(f"round {number}: refused {row['refused']}, errors {row['errors'] or 'none'}; cores: {cores}")
    lines.append(f"goodput {share:.1%} of the peak (rounds {least:.1%} to {most:.1%} of the peaks around them)")
    return "\n".join(lines)


def requests_text(found: Results) -> str:
    names = list(dict.fromkeys(name for row in found["systems"].values() for name in row["cpu_ms"]))
    rows: list[list[object]] = [["median (smallest-largest)", *found["systems"]]]
    for title, key in (("requests/s", "requests_per_s"), ("p50, ms", "ms_p50"), ("p99, ms", "ms_p99")):
        rows.append([title, *(_spread(row[key]) for row in found["systems"].values())])
    for name in names:
        rows.append([f"{name}, ms/request", *(_spread(row["cpu_ms"].get(name)) for row in found["systems"].values())])
    failed = {name: row["failed"] for name, row in found["systems"].items()}
    return "\n".join(
        [
            f"{found['rounds']} rounds of {found['seconds']:g} s in turn, {found['connections']} connections; not 200:"
            f" {', '.join(f'{name} {count}' for name, count in failed.items())}",
            table(rows),
        ]
    )


def _spread(values: Sequence[float] | None) -> str:
    return "-" if values is None else f"{values[0]:,} ({values[1]:,}-{values[2]:,})"
