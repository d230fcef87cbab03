"""The `millrace` command: a table of subcommands, each a function of its arguments.

Imports happen inside the commands, so that `millrace --help` answers at once and `millrace models list` needs no
runtime.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from batcher.backend import BackendError
from kernels.loader import KernelsUnavailable
from services.settings import SettingsError, add_flags, package_version, read_settings
from wire.errors import BadRequest, MillraceError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # argparse's own name for it is private


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 1 for an error that has words, 2 for wrong usage."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
        return code
    except (SettingsError, MillraceError, KernelsUnavailable, BackendError) as error:
        print(f"millrace: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError | BadRequest) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `millrace ... | head`
        sys.stderr.close()
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="millrace", description="Serve language models: one process or many.")
    parser.add_argument("--version", action="version", version=f"millrace {package_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="gateway and worker in one process")
    up.set_defaults(command=_up)

    gateway = commands.add_parser("gateway", help="HTTP in a process of its own, over a queue in Redis")
    gateway.set_defaults(command=_gateway)
    worker = commands.add_parser("worker", help="engines in a process of their own, over a queue in Redis")
    worker.set_defaults(command=_worker)

    generate = commands.add_parser("generate", help="one answer from a model, without a server")
    generate.add_argument("prompt", nargs="?", help="a message to the model (its chat template is applied)")
    generate.add_argument("--model", help="name or name@revision (default: the first of --models)")
    generate.add_argument("--raw", action="store_true", help="no chat template: continue the prompt as it stands")
    generate.add_argument("--input-ids", metavar="1,2,3", help="token ids instead of a prompt")
    generate.add_argument("--max-tokens", type=int, default=256)
    generate.add_argument("--temperature", type=float, default=0.0)
    generate.add_argument("--top-k", type=int, default=0)
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--min-p", type=float, default=0.0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--ignore-eos", action="store_true", help="go on after an end token, to max-tokens")
    generate.add_argument("--json", action="store_true")
    generate.set_defaults(command=_generate)

    models = commands.add_parser("models", help="the model store")
    actions = models.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("import", help="import a Hugging Face directory")
    action.add_argument("directory")
    action.add_argument("--name", required=True)
    action.add_argument(
        "--target", default="cpu", choices=("cpu", "cuda", "tensorrt"), help="where it will run (default cpu)"
    )
    action.add_argument(
        "--scheme",
        help="how weights, activations and the KV cache are stored: cpu w8a8, fp32; cuda bf16, fp16, bf16-kv-int8,"
        " bf16-kv-fp8, w8a16, w4a16; tensorrt int8, int4, fp8 (default: the target's first)",
    )
    action.add_argument(
        "--calibration", metavar="FILE", help="text to measure ranges on, for the schemes that need it (UTF-8)"
    )
    action.add_argument(
        "--parity-bound",
        type=float,
        help="largest relative error of a row of logits to accept (default: the scheme's, such as 0.25 for w8a8)",
    )
    action.add_argument("--json", action="store_true")
    action.set_defaults(command=_models_import)
    for name, help_text in (
        ("list", "what the store holds"),
        ("show", "one model's manifest"),
        ("verify", "hash every file again"),
        ("rm", "remove one revision"),
    ):
        action = actions.add_parser(name, help=help_text)
        if name != "list":
            action.add_argument("model", help="name or name@revision")
        action.add_argument("--json", action="store_true")
        action.set_defaults(command=_models_action, action=name)

    engines = commands.add_parser("engines", help="TensorRT engines: built at release, never while serving")
    engine_actions = engines.add_subparsers(required=True, metavar="ACTION")
    for name, help_text in (
        ("build", "build a model's engines for this machine: GPU, driver, libraries, and --max-batch-tokens"),
        ("list", "the machines that a model has engines for"),
    ):
        action = engine_actions.add_parser(name, help=help_text)
        action.add_argument("model", help="name or name@revision, imported with --target tensorrt")
        action.add_argument("--json", action="store_true")
        action.set_defaults(command=_engines, action=name)

    keys = _add_keys(commands)

    workers = commands.add_parser("workers", help="the workers that have reported to the shared queue of late")
    workers.add_argument("--json", action="store_true")
    workers.set_defaults(command=_workers)

    probe = _add_probe(commands)

    doctor = commands.add_parser("doctor", help="this machine, and the sizes that would be chosen here")
    doctor.add_argument("--json", action="store_true")
    doctor.set_defaults(command=_doctor)

    bench = commands.add_parser("bench", help="measure")
    kinds = bench.add_subparsers(required=True, metavar="WHAT")
    engine = kinds.add_parser("engine", help="the engine with random tokens: scheduler, model and sampling, no HTTP")
    engine.add_argument("--model", help="name or name@revision (default: the first of --models)")
    engine.add_argument("--prompt-tokens", type=int, default=128)
    engine.add_argument("--new-tokens", type=int, default=64)
    engine.add_argument("--concurrency", default="1,8,32", metavar="1,8,32")
    engine.add_argument(
        "--rounds", type=int, default=3, help="passes over all concurrencies, interleaved; medians are shown"
    )
    engine.add_argument("--profile", action="store_true", help="also split a step by operator (an extra pass)")
    engine.add_argument("--json", action="store_true")
    engine.set_defaults(command=_bench_engine)

    for leaf in (
        up,
        gateway,
        worker,
        generate,
        doctor,
        engine,
        *actions.choices.values(),
        *engine_actions.choices.values(),
        *keys.choices.values(),
        workers,
        probe,
    ):
        add_flags(leaf)
    return parser


def _add_keys(commands: Commands) -> Commands:
    keys = commands.add_parser("keys", help="API keys of the gateway, in the file of --keys-file")
    actions: Commands = keys.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="a new key; its secret is printed once and kept nowhere")
    create.add_argument("--tenant", required=True, help="whose key it is: up to 64 of A-Z a-z 0-9 . _ -")
    create.add_argument("--weight", type=int, default=1, help="the tenant's share among those who wait (1 to 64)")
    create.add_argument("--expires", metavar="90d", help="after so many minutes, hours or days: 30m, 12h, 90d")
    create.add_argument("--note", default="", help="for those who read the list")
    create.set_defaults(command=_keys_create)
    show_list = actions.add_parser("list", help="all keys, without their secrets")
    show_list.set_defaults(command=_keys_list)
    revoke = actions.add_parser("revoke", help="let a key in no more; running gateways hear of it within a second")
    revoke.add_argument("id", help="as `keys list` shows it")
    revoke.set_defaults(command=_keys_revoke)
    for action in (create, show_list, revoke):
        action.add_argument("--json", action="store_true")
    return actions


def _add_probe(commands: Commands) -> argparse.ArgumentParser:
    probe = commands.add_parser("probe", help="ask the workers known questions, again and again, and export the score")
    probe.add_argument("--model", help="name or name@revision (default: the first of --models)")
    probe.add_argument("--golden", metavar="FILE", help="questions with their answers (default: the shipped model's)")
    probe.add_argument("--items", type=int, default=0, help="ask only so many of them, always the same (0 = all)")
    probe.add_argument("--concurrency", type=int, default=8, help="questions in the queue at once (1 to 256)")
    probe.add_argument(
        "--every", type=float, default=300.0, metavar="SECONDS", help="a run starts so often (1 to 86400)"
    )
    probe.add_argument("--baseline", metavar="FILE", help="answers to compare with, of the same revision")
    probe.add_argument("--record", metavar="FILE", help="one run, whose answers become the baseline")
    probe.add_argument("--once", action="store_true", help="one run, printed")
    probe.add_argument("--json", action="store_true", help="print it as JSON")
    probe.set_defaults(command=_probe)
    return probe


def _up(arguments: argparse.Namespace) -> int:
    from services.up import up

    return up(read_settings(arguments))


def _gateway(arguments: argparse.Namespace) -> int:
    from services.gateway_process import run_gateway

    return run_gateway(read_settings(arguments))


def _worker(arguments: argparse.Namespace) -> int:
    from services.worker_process import run_worker

    return run_worker(read_settings(arguments))


def _generate(arguments: argparse.Namespace) -> int:
    from services.generate import Question, generate

    if (arguments.prompt is None) == (arguments.input_ids is None):
        raise BadRequest("give a prompt or --input-ids, one of the two")
    settings = read_settings(arguments)
    question = Question(
        model=arguments.model or settings.model_names[0],
        prompt=arguments.prompt,
        is_raw=arguments.raw,
        input_ids=None if arguments.input_ids is None else _integers(arguments.input_ids, "--input-ids"),
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
    )
    return generate(settings, question, as_json=arguments.json)


def _models_import(arguments: argparse.Namespace) -> int:
    from services.model_commands import import_directory

    settings = read_settings(arguments)
    bound = arguments.parity_bound
    if bound is not None and not 0 < bound < 1:
        raise BadRequest(f"--parity-bound is {bound}; expected a number between 0 and 1", param="--parity-bound")
    calibration = arguments.calibration
    return import_directory(
        settings,
        arguments.directory,
        arguments.name,
        target=arguments.target,
        scheme=arguments.scheme,
        calibration=None if calibration is None else Path(calibration).expanduser(),
        parity_bound=bound,
        as_json=arguments.json,
    )


def _models_action(arguments: argparse.Namespace) -> int:
    from services import model_commands

    settings = read_settings(arguments)
    if arguments.action == "list":
        return model_commands.show_list(settings, as_json=arguments.json)
    actions = {"show": model_commands.show, "verify": model_commands.verify, "rm": model_commands.remove}
    return actions[arguments.action](settings, arguments.model, as_json=arguments.json)


def _engines(arguments: argparse.Namespace) -> int:
    from services.engine_commands import build_engines, list_engines

    settings = read_settings(arguments)
    if arguments.action == "list":
        return list_engines(settings, arguments.model, as_json=arguments.json)
    from services.backends.tensorrt import TensorRtMachine

    return build_engines(settings, arguments.model, TensorRtMachine(), as_json=arguments.json)


def _keys_create(arguments: argparse.Namespace) -> int:
    from services import key_commands

    return key_commands.create(
        read_settings(arguments),
        arguments.tenant,
        weight=arguments.weight,
        expires=arguments.expires,
        note=arguments.note,
        as_json=arguments.json,
    )


def _keys_list(arguments: argparse.Namespace) -> int:
    from services import key_commands

    return key_commands.show_list(read_settings(arguments), as_json=arguments.json)


def _keys_revoke(arguments: argparse.Namespace) -> int:
    from services import key_commands

    return key_commands.revoke(read_settings(arguments), arguments.id, as_json=arguments.json)


def _workers(arguments: argparse.Namespace) -> int:
    from services.worker_list import show_workers

    return show_workers(read_settings(arguments), as_json=arguments.json)


def _probe(arguments: argparse.Namespace) -> int:
    from services.prober.process import ProbeOptions, probe

    for flag, low, high in (("items", 0, 10_000), ("concurrency", 1, 256), ("every", 1, 86_400)):
        if not low <= (value := getattr(arguments, flag)) <= high:
            raise BadRequest(f"--{flag} is {value}; expected a number from {low} to {high:,}", param=f"--{flag}")
    settings = read_settings(arguments)

    def path(given: str | None) -> Path | None:
        return None if given is None else Path(given).expanduser()

    options = ProbeOptions(
        model=arguments.model or settings.model_names[0],
        golden=path(arguments.golden),
        most_items=arguments.items,
        concurrency=arguments.concurrency,
        every_s=arguments.every,
        baseline=path(arguments.baseline),
        record=path(arguments.record),
        is_once=arguments.once,
        as_json=arguments.json,
    )
    return probe(settings, options)


def _doctor(arguments: argparse.Namespace) -> int:
    from services.doctor import doctor

    return doctor(read_settings(arguments), as_json=arguments.json)


def _bench_engine(arguments: argparse.Namespace) -> int:
    from services.bench import Workload, bench_engine

    settings = read_settings(arguments)
    workload = Workload(
        prompt_tokens=arguments.prompt_tokens,
        new_tokens=arguments.new_tokens,
        concurrency=tuple(_integers(arguments.concurrency, "--concurrency")),
        rounds=arguments.rounds,
    )
    name = arguments.model or settings.model_names[0]
    return bench_engine(settings, name, workload, profile=arguments.profile, as_json=arguments.json)


def _integers(text: str, flag: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadRequest(f"{flag} {text!r} is not a comma-separated list of whole numbers", param=flag) from None


if __name__ == "__main__":
    sys.exit(main())
