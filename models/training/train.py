"""Train millpond from scratch on a CPU: Muon for the matrices, AdamW for the rest; warm-up, plateau, decay.

Every batch is a function of (seed, step, worker), so a run that was killed goes on from its last checkpoint as if
nothing had happened. Each worker is a process of one thread with its share of the batch: they meet once a step, not at
every operator, which matters where others use the processor too. The schedule counts steps, never seconds.

    python -m models.training.train --out runs/millpond
    python -m models.training.train --out runs/millpond --resume
"""

import argparse
import multiprocessing
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as distributed
from tokenizers import Tokenizer

from models.training.data import ROW_LENGTH, Encoder, Rows, conversations, pack
from models.training.network import Decoder, Shape
from models.training.objective import held_out_accuracy, hidden_loss

WARMUP_STEPS = 60
DECAY_FRACTION = 0.65
LONG_ROW_EVERY = 16  # steps; such a batch has rows of the whole context
MUON_LR = 4e-3
ADAM_LR = 4e-3


@dataclass(frozen=True, slots=True)
class Run:
    out: Path
    steps: int
    batch_tokens: int  # of all workers together
    workers: int
    seed: int
    is_compiled: bool
    is_resumed: bool
    checkpoint_every: int
    tokenizer: Path


def learning_rate_scale(step: int, steps: int) -> float:
    """Linear warm-up, plateau, linear decay to nothing (WSD: a plateau can be continued or cut short)."""
    decay_start = int(steps * (1 - DECAY_FRACTION))
    if step < decay_start:
        return min(1.0, (step + 1) / WARMUP_STEPS)
    return max(0.0, (steps - step) / (steps - decay_start))


def optimizers(model: Decoder) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def encoder_of(tokenizer: Tokenizer) -> Encoder:
    def encode(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(texts)]

    def token_id(token: str) -> int:
        number = tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"the tokenizer lacks {token}")
        return int(number)

    return Encoder(encode, token_id)


def batch_of(encoder: Encoder, run: Run, step: int, worker: int) -> Rows:
    """This worker's share of a step's batch."""
    rng = random.Random(f"{run.seed} {step} {worker}")
    is_long = step % LONG_ROW_EVERY == LONG_ROW_EVERY - 1
    length = 1024 if is_long else ROW_LENGTH
    stream = conversations(rng, turns_of_long=40 if is_long else 1)
    return pack(encoder, stream, run.batch_tokens // length // run.workers, length)


def save(run: Run, model: Decoder, all_optimizers: list[torch.optim.Optimizer], step: int, name: str) -> None:
    state = {
        "shape": asdict(model.shape),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in all_optimizers],
        "step": step,
    }
    torch.save(state, run.out / "writing.pt")
    os.replace(run.out / "writing.pt", run.out / name)


def load(path: Path, model: Decoder, all_optimizers: list[torch.optim.Optimizer]) -> int:
    """Restore a checkpoint; returns the step to go on with."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(all_optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])


def average_gradients(model: Decoder, workers: int) -> None:
    """Replace every gradient by its mean over the workers, in one message."""
    if workers == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= workers
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()


def update(model: Decoder, all_optimizers: list[torch.optim.Optimizer]) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in all_optimizers:
        optimizer.step()
        optimizer.zero_grad()


def report_and_save(
    run: Run, model: Decoder, all_optimizers: list[torch.optim.Optimizer], encoder: Encoder, step: int
) -> None:
    save(run, model, all_optimizers, step, "last.pt")
    accuracy = held_out_accuracy(model, encoder, 16)
    listed = " ".join(f"{category} {share:.2f}" for category, share in accuracy.items())
    print(f"step {step} held-out mean {sum(accuracy.values()) / len(accuracy):.3f}: {listed}", flush=True)


def train(run: Run, worker: int) -> None:
    """One worker's part of the run; worker 0 prints and saves."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    if run.workers > 1:
        rendezvous = f"file://{(run.out / 'rendezvous').resolve()}"
        distributed.init_process_group("gloo", init_method=rendezvous, rank=worker, world_size=run.workers)
    model = Decoder(Shape())
    forward: torch.nn.Module = torch.compile(model, dynamic=False) if run.is_compiled else model  # type: ignore[assignment]
    all_optimizers, encoder = optimizers(model), encoder_of(Tokenizer.from_file(str(run.tokenizer)))
    base = [group["lr"] for optimizer in all_optimizers for group in optimizer.param_groups]
    start = load(run.out / "last.pt", model, all_optimizers) if run.is_resumed else 0
    started, mean_loss = time.monotonic(), 0.0
    for step in range(start, run.steps):
        scale = learning_rate_scale(step, run.steps)
        for group, rate in zip((g for o in all_optimizers for g in o.param_groups), base, strict=True):
            group["lr"] = rate * scale
        loss, _, _ = hidden_loss(model, forward, batch_of(encoder, run, step, worker))
        loss.backward()  # type: ignore[no-untyped-call]
        average_gradients(model, run.workers)
        update(model, all_optimizers)
        mean_loss = float(loss) if step == start else 0.98 * mean_loss + 0.02 * float(loss)
        if worker == 0 and (step + 1) % 20 == 0:
            pace = run.batch_tokens * (step + 1 - start) / (time.monotonic() - started)
            print(f"step {step + 1}/{run.steps} loss {mean_loss:.3f} lr x{scale:.2f} {pace:.0f} tokens/s", flush=True)
        if worker == 0 and ((step + 1) % run.checkpoint_every == 0 or step + 1 == run.steps):
            report_and_save(run, model, all_optimizers, encoder, step + 1)


def arguments_of_command_line() -> Run:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for checkpoints (last.pt)")
    parser.add_argument("--tokenizer", type=Path, default=Path("models/millpond/tokenizer.json"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of all workers together")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--checkpoint-every", type=int, default=200, help="steps between checkpoints and held-out checks"
    )
    parser.add_argument("--resume", action="store_true", help="go on from last.pt")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile (no C++ compiler)")
    a = parser.parse_args()
    is_compiled = not a.no_compile
    return Run(
        a.out, a.steps, a.batch_tokens, a.workers, a.seed, is_compiled, a.resume, a.checkpoint_every, a.tokenizer
    )


def main() -> None:
    run = arguments_of_command_line()
    run.out.mkdir(parents=True, exist_ok=True)
    (run.out / "rendezvous").unlink(missing_ok=True)
    spawn = multiprocessing.get_context("spawn")
    others = [spawn.Process(target=train, args=(run, worker), daemon=True) for worker in range(1, run.workers)]
    for other in others:
        other.start()
    train(run, 0)


if __name__ == "__main__":
    main()
