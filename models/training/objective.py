"""What training minimises, and what it is for: the loss on assistant tokens, and exact answers on held-out problems.

Apart from the loop so that both use the same forward pass: an answer is exact when the prediction is right at every
token of it given the right tokens before, which is the same as greedy decoding being right, at the cost of one pass.
"""

import random
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as functional
from torch import Tensor

from models.training.data import CHECKED, IGNORED, ROW_LENGTH, Encoder, Rows
from models.training.example import Example
from models.training.network import Decoder, document_mask


def hidden_loss(model: Decoder, forward: torch.nn.Module, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss over the labelled tokens, their predictions and the mask [B, T] of where they are."""
    labels = torch.from_numpy(rows.labels)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = forward(torch.from_numpy(rows.input_ids), document_mask(torch.from_numpy(rows.document)))
        counted = labels != IGNORED
        logits = (hidden[counted] @ model.embed_tokens.weight.T).float()
    return functional.cross_entropy(logits, labels[counted]), logits.argmax(-1), counted


def one_per_row(encoder: Encoder, asked: list[Example]) -> Rows:
    """A row of its own for each example, and labels on its last answer only."""
    rows = len(asked)
    input_ids = np.zeros((rows, ROW_LENGTH), np.int64)
    labels = np.full((rows, ROW_LENGTH), IGNORED, np.int64)
    for row, example in enumerate(asked):
        prompt = encoder(example.messages[:-1])[0]
        ids = encoder(example.messages)[0]
        input_ids[row, : len(ids) - 1] = ids[:-1]
        labels[row, len(prompt) : len(ids) - 1] = ids[len(prompt) + 1 :]
    return Rows(input_ids, labels, np.zeros_like(input_ids))


@torch.no_grad()
def held_out_accuracy(model: Decoder, encoder: Encoder, rows: int) -> dict[str, float]:
    """Exact answers on held-out problems, teacher-forced: all tokens right means greedy decoding is right."""
    accuracy = {}
    for category, (generate, _) in CHECKED.items():
        rng = random.Random(f"validation {category}")
        pool = (generate(rng) for _ in iter(int, 1))
        asked = list(islice((example for example in pool if example.is_held_out), 2 * rows))
        right = 0
        for half in (asked[:rows], asked[rows:]):
            batch = one_per_row(encoder, half)
            _, predicted, counted = hidden_loss(model, model, batch)
            wrong = torch.zeros(counted.shape, dtype=torch.bool)
            wrong[counted] = predicted != torch.from_numpy(batch.labels)[counted]
            right += int((~wrong.any(dim=1)).sum())
        accuracy[category] = right / (2 * rows)
    return accuracy
