"""What each worker does with its time, its memory and its leases."""

from __future__ import annotations

from typing import Final

from scripts.dashboards.grafana import Dashboard, Limit, Panel, Query, Row, Variable
from scripts.dashboards.promql import CHOSEN, MODELS, heat, hit_share, per, quantiles, rate

INSTANCE: Final = Variable("instance", "Worker", 'label_values(millrace_up{model_name=~"$model_name"}, instance)')
HERE: Final = 'instance=~"$instance"'
THESE: Final = f"{CHOSEN},{HERE}"
STEPS: Final = "millrace_engine_steps_total"


def each(gauge: str) -> str:
    """A gauge of every chosen worker."""
    return f"max by (instance, model_name) ({gauge}{{{THESE}}})"


def by(labels: str, counter: str) -> str:
    """The rate of every chosen worker."""
    return rate(counter, labels, THESE)


HEALTH: Final = Row("Health", [
    Panel(
        "Engine steps", "1 while steps commit or nothing waits. Normal: 1; at 0 it stands still with work.",
        "bool_yes_no", [Query(each("millrace_up"), "{{instance}} {{model_name}}")],
        "number", 8, [Limit(1, "green")], below="red", alerts=["MillraceEngineHung"],
    ),
    Panel(
        "Drains", "1 while a process takes nothing new. Normal: 0, but in a release or a scale-in.",
        "bool_yes_no", [Query(f"max by (instance) (millrace_draining{{{HERE}}})", "{{instance}}")],
        "number", 8, [Limit(1, "blue")], alerts=["MillraceDraining"],
    ),
    Panel(
        "Device busy",
        "Share of the time, cpu of what the container may use, GPUs by NVML. Normal: high under load.",
        "percentunit",
        [Query(f"max by (instance, device) (millrace_device_utilization_ratio{{{HERE}}})", "{{instance}} {{device}}")],
        "number", 8, [Limit(0.8, "yellow"), Limit(0.95, "red")], highest=1, alerts=["MillraceDeviceSaturated"],
    ),
], height=5)  # fmt: skip

BATCH: Final = Row("Batch", [
    Panel(
        "Sequences in the batch", "Computed together in every step. Normal: it follows the load up to max_batch_seqs.",
        "short", [Query(each("vllm:num_requests_running"), "{{instance}}")],
    ),
    Panel(
        "Leased and waiting",
        "Requests that a worker has taken and cannot run yet. Normal: near 0, since it leases only what fits.",
        "short", [Query(each("vllm:num_requests_waiting"), "{{instance}}")],
    ),
    Panel(
        "KV blocks in use", "Share of the pool. Normal: up and down with the load, under the dashed line.",
        "percentunit", [Query(each("vllm:kv_cache_usage_perc"), "{{instance}}")],
        limits=[Limit(0.95, "red")], highest=1, alerts=["MillraceKvPressure"],
    ),
    Panel(
        "Tokens computed",
        "A second, of prompts (prefill) and one by one (decode). Normal: decode is steady, prefill comes in bursts.",
        "short", [Query(by("instance, kind", "millrace_scheduled_tokens_total"), "{{instance}} {{kind}}")], "areas",
    ),
    Panel(
        "Tokens in a step", "How well steps are filled. Normal: high under load, up to max_batch_tokens.",
        "short",
        [Query(per(by("instance", "millrace_scheduled_tokens_total"), by("instance", STEPS)), "{{instance}}")],
    ),
    Panel(
        "Preempted", "Sequences that gave up their KV blocks and are computed again. Normal: none.",
        "ops", [Query(by("instance", "vllm:num_preemptions_total"), "{{instance}}")], alerts=["MillraceKvPressure"],
    ),
])  # fmt: skip

TIME: Final = Row("Time", [
    Panel(
        "Mean time of a step, by part",
        "Of the chosen workers. Normal: nearly all is forward; plan, pack and commit are ours and cost little.",
        "s",
        [Query(
            f"{by('part', 'millrace_engine_step_seconds_total')} / on () group_left () ({by('', STEPS)} > 0)",
            "{{part}}",
        )],
        "areas",
    ),
    Panel(
        "Prompt tokens found in the prefix cache",
        "Share of what was looked up. Normal: alike at all workers; one that has just begun has to fill its own.",
        "percentunit", [Query(hit_share("instance", THESE), "{{instance}}")],
        highest=1, alerts=["MillracePrefixHitCollapse"],
    ),
    Panel(
        "Publishing",
        "One call that puts the tokens of a step into the queue. Normal: some ms; else Redis or the network is slow.",
        "s", quantiles("millrace_publish_seconds", where=THESE),
    ),
])  # fmt: skip

LEASES: Final = Row("Leases", [
    Panel(
        "Requests leased, by delivery",
        "For the first time, again after another worker lost it, and for the last time (suspect), when it runs alone. "
        "Normal: first.",
        "reqps", [Query(by("kind", "millrace_leases_total"), "{{kind}}")], "areas",
        alerts=["MillraceRequestsTakenOver", "MillraceDeadLetters"],
    ),
    Panel(
        "Leases lost", "To another worker, or ended meanwhile. Normal: none, but for cancelled requests.",
        "reqps", [Query(by("instance", "millrace_leases_fenced_total"), "{{instance}}")],
        alerts=["MillraceRequestsTakenOver"],
    ),
    Panel(
        "Publishing, as a heatmap", "How many calls took how long. Normal: one band of some ms.",
        "s", heat("millrace_publish_seconds", THESE), "heatmap",
    ),
])  # fmt: skip

WORKER: Final = Dashboard(
    "millrace-worker", "Worker", "What each worker does with its time, its memory and its leases.",
    [HEALTH, BATCH, TIME, LEASES], [*MODELS, INSTANCE],
)  # fmt: skip
