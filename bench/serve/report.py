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
    peak, over, after = found["peak"], found["overload"], found["recovery"]
    first_peaks = ", ".join(f"{row['clients']}: {row['good_per_s']:g}" for row in found["search"])
    return "\n".join(
        [
            f"capacity, answers/s in time by clients at once: {first_peaks}",
            f"max_queued_tokens {found['max_queued_tokens']:,} ({found['queue_s']:g} s of the capacity); deadline"
            f" {found['deadline_s']:g} s",
            f"before: first token p50 {found['calm']['ttft_ms_p50']} ms, p90 {found['calm']['ttft_ms_p90']} ms",
            f"peak, {peak['clients']} clients: {peak['good_per_s']:g} answers/s in time ({peak['tokens_per_s']:,}"
            f" tokens/s); afterwards {found['peak_after']['good_per_s']:g}",
            f"offered {over['offered_per_s']:g}/s for {over['seconds']:g} s (the client was late by"
            f" {over['sent_late_ms_p99']} ms at p99): {over['sent']:,} requests",
            f"  answered whole in time {over['good']:,}, too late {over['late']:,}, refused {over['refused']},"
            f" errors {over['errors'] or 'none'}, not sent {over['unsent']:,},"
            f" without an end {over['unfinished']:,}",
            f"  goodput {over['good_per_s']:g}/s, {over['share_of_peak']:.1%} of the peak; first token p99"
            f" {over['ttft_ms_p99']} ms",
            f"  refusals took {over['refusal_ms_p50']} ms at p50, {over['refusal_ms_p99']} ms at p99",
            f"  processor cores: {', '.join(f'{name} {cores:g}' for name, cores in over['cores'].items())}",
            f"after the end: queue empty after {_seconds(after['queue_empty_s'])}, first tokens as before after"
            f" {_seconds(after['ttft_as_before_s'])}",
        ]
    )


def _seconds(value: float | None) -> str:
    return "more than was waited" if value is None else f"{value:g} s"


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
