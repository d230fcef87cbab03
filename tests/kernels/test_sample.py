"""Sample: the token is the one that the definition names, whatever the form, the batch and the threads."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from batcher.backend import SamplingInput
from batcher.sampling import sample as defined_sample
from kernels.loader import isa_available, load
from tests.kernels.attention_case import form, parallel, scratch_of
from tests.kernels.guarded import before_a_guard
from tests.kernels.one_node import OneNode, failure, run
from tests.kernels.reference import Draw, Floats, gumbel, philox, sample_row

FORMS = isa_available()
FLOAT_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Params:
    """One row's parameters."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0


GREEDY = Params(temperature=0.0)
_TYPES: dict[str, type[np.generic]] = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "seed": np.int64,
    "position": np.int64,
}


class _Sample(ctypes.Structure):
    """struct mr_sample."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("num_rows", "vocab_size")),
        *((name, ctypes.c_void_p) for name in ("logits", *_TYPES, "token_ids", "slots")),
    )


def columns(rows: list[Params]) -> dict[str, NDArray[np.generic]]:
    """The parameters as the operator takes them."""
    return {name: np.array([getattr(row, name) for row in rows], dtype) for name, dtype in _TYPES.items()}


def sampling_input(row: Params) -> SamplingInput:
    """The parameters as the batcher takes them."""
    return SamplingInput(
        temperature=np.array([row.temperature], np.float32),
        top_k=np.array([row.top_k], np.int32),
        top_p=np.array([row.top_p], np.float32),
        min_p=np.array([row.min_p], np.float32),
        seed=np.array([row.seed]),
        position=np.array([row.position]),
    )


def run_sample(logits: Floats, rows: list[Params], threads: int = 1) -> list[int]:
    """The kernel of the active form; every tensor ends where memory ends."""
    token_ids = before_a_guard(np.full(len(rows), -99, np.int64))
    arrays = {name: before_a_guard(array) for name, array in {"logits": logits, **columns(rows)}.items()}
    arguments = _Sample(num_rows=len(rows), vocab_size=logits.shape[1], token_ids=token_ids.ctypes.data)
    for name, array in arrays.items():
        setattr(arguments, name, array.ctypes.data)
    library, loop = load(), parallel(threads)
    library.millrace_sample_scratch_bytes.restype = ctypes.c_size_t
    num_bytes = library.millrace_sample_scratch_bytes(ctypes.byref(arguments), ctypes.c_size_t(threads))
    scratch = scratch_of(num_bytes)
    arguments.slots = scratch.ctypes.data if num_bytes else None
    library.millrace_sample(ctypes.byref(arguments), ctypes.byref(loop))
    return [int(token) for token in token_ids]


def expected(logits: Floats, row: Params) -> Draw:
    """The reference on parameters as float32 holds them."""
    values = {name: array[0].item() for name, array in columns([row]).items()}
    return sample_row(logits, **values)


seeds = st.integers(-(2**63), 2**63 - 1)
params = st.builds(
    Params,
    temperature=st.sampled_from([0.0, 0.05, 0.7, 1.0, 1.3, 30.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 40, 100, 1500]),
    top_p=st.sampled_from([1.0, 1.0, 0.99, 0.9, 0.5, 0.1, 0.0]),
    min_p=st.sampled_from([0.0, 0.0, 0.01, 0.2, 1.0]),
    seed=seeds,
    position=st.integers(0, 2**40),
)


@st.composite
def logit_rows(draw: st.DrawFn) -> Floats:
    """Peaked and flat rows, rows with many ties, rows with tokens masked out."""
    size = draw(st.sampled_from([1, 2, 15, 16, 63, 64, 65, 200, 1023, 1024, 1025, 5000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = rng.standard_normal(size).astype(np.float32) * np.float32(draw(st.sampled_from([0.1, 2.0, 6.0])))
    if draw(st.booleans()):
        logits = np.round(logits)
    if draw(st.booleans()):
        logits[rng.random(size) < 0.3] = draw(st.sampled_from([-np.inf, np.nan]))
    return logits


@pytest.mark.parametrize("name", FORMS)
def test_random_rows_get_the_token_of_the_reference(name: str) -> None:
    """Tokens that float noise decides are left out; they must be rare for that to be fair."""
    counts = {"clear": 0, "ambiguous": 0}

    @settings(max_examples=250, deadline=None)
    @given(logits=logit_rows(), row=params)
    def check(logits: Floats, row: Params) -> None:
        draw = expected(logits, row)
        counts["ambiguous" if draw.is_ambiguous else "clear"] += 1
        with form(name):
            (token,) = run_sample(logits[None], [row])
        assert draw.is_ambiguous or token == draw.token

    check()
    assert counts["ambiguous"] < 0.05 * counts["clear"]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    "row",
    [
        Params(),
        Params(temperature=0.3),
        Params(top_k=50),
        Params(top_k=900),
        Params(top_k=20_000),
        Params(top_p=0.95),
        Params(top_p=0.999),
        Params(top_k=64, top_p=0.8),
        Params(top_k=5000, top_p=0.97, min_p=0.001, temperature=1.5),
        Params(min_p=0.05),
    ],
    ids=str,
)
def test_a_large_vocabulary_gets_the_tokens_of_the_reference(name: str, row: Params) -> None:
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((12, 49_152)) * 2.5).astype(np.float32)
    rows = [replace(row, seed=7**index, position=100 + index) for index in range(12)]
    draws = [expected(line, each) for line, each in zip(logits, rows, strict=True)]
    with form(name):
        tokens = run_sample(logits, rows)
    clear = [index for index, draw in enumerate(draws) if not draw.is_ambiguous]
    assert len(clear) >= 10
    assert [tokens[index] for index in clear] == [draws[index].token for index in clear]


@settings(max_examples=150, deadline=None)
@given(logits=logit_rows(), row=params)
def test_every_form_draws_the_same_token(logits: Floats, row: Params) -> None:
    tokens = []
    for name in FORMS:
        with form(name):
            tokens += run_sample(logits[None], [row])
    assert len(set(tokens)) == 1


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(params, min_size=2, max_size=12), seed=st.integers(0, 2**32), threads=st.integers(1, 3))
def test_a_row_in_a_batch_is_the_row_alone(name: str, rows: list[Params], seed: int, threads: int) -> None:
    logits = np.random.default_rng(seed).standard_normal((len(rows), 700), dtype=np.float32) * 3
    with form(name):
        alone = [run_sample(logits[index : index + 1], [row])[0] for index, row in enumerate(rows)]
        assert run_sample(logits, rows, threads) == alone


@pytest.mark.parametrize("name", FORMS)
@settings(max_examples=100, deadline=None)
@given(logits=logit_rows(), row=params)
def test_the_definition_in_the_batcher_says_the_same(name: str, logits: Floats, row: Params) -> None:
    row = replace(row, seed=row.seed & (2**63 - 1))  # it takes no negative seeds
    assume(not expected(logits, row).is_ambiguous)
    with form(name):
        tokens = run_sample(logits[None], [row])
    assert tokens == defined_sample(logits[None], sampling_input(row)).tolist()


# what is in the row, its logits, the parameters, the token
TABLE: list[tuple[str, list[float], Params, int]] = [
    ("the largest", [1, 3, 2], GREEDY, 1),
    ("the lower id on a tie", [1, 3, 3], GREEDY, 1),
    ("both zeros are one number", [-0.0, 0.0, -1], GREEDY, 0),
    ("NaN counts as -inf", [np.nan, -5, np.nan], GREEDY, 1),
    ("all NaN", [np.nan] * 70, GREEDY, -1),
    ("all -inf", [-np.inf] * 70, Params(), -1),
    ("+inf alone is not finite", [np.inf, np.nan, -np.inf], Params(), -1),
    ("+inf beside a finite logit wins", [0, np.inf, 5], GREEDY, 1),
    ("+inf is the largest float, which stands before it", [0, FLOAT_MAX, np.inf], GREEDY, 1),
    ("also far before it", [0, FLOAT_MAX] + [0] * 3000 + [np.inf], GREEDY, 1),
    ("+inf also wins a draw", [0, 1, np.inf], Params(), 2),
    ("the last of a long row", [0.0] * 3000 + [1.0], GREEDY, 3000),
    ("top_k 1", [1, 3, 3, 2], Params(top_k=1, temperature=100), 1),
    ("top_k 1 of two zeros", [-0.0, 0.0, -1], Params(top_k=1, temperature=100), 0),
    ("top_p 0 keeps one", [1, 3, 3, 2], Params(top_p=0, temperature=100), 1),
    ("a tiny top_p keeps one", [1, 3, 3, 2], Params(top_p=1e-6, temperature=100), 1),
    ("min_p beyond 1 keeps one", [1, 3, 3, 2], Params(min_p=1.5, temperature=100), 1),
    ("a tiny temperature is greedy", [1, 3, 2], Params(temperature=1e-38), 1),
    ("a subnormal temperature is greedy", [1, 3, 2], Params(temperature=1e-45), 1),
    ("one token", [0.5], Params(top_k=7, top_p=0.3), 0),
]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("logits", "row", "token"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_rows_that_need_no_luck(name: str, logits: list[float], row: Params, token: int) -> None:
    with form(name):
        tokens = {run_sample(np.array([logits], np.float32), [replace(row, seed=seed)])[0] for seed in range(20)}
    assert tokens == {token}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (Params(top_k=7), range(7)),  # ties: the lower ids
        (Params(top_p=0.25), range(25)),
        (Params(top_p=0.251), range(26)),
        (Params(top_k=50, top_p=0.5), range(25)),  # top_p of what top_k left
        (Params(min_p=1.0), range(100)),
        (Params(), range(100)),
    ],
)
def test_of_equal_logits_the_lowest_ids_are_kept(name: str, row: Params, kept: range) -> None:
    rows = [replace(row, seed=seed) for seed in range(3000)]
    with form(name):
        tokens = run_sample(np.full((3000, 100), 2.5, np.float32), rows)
    assert set(tokens) == set(kept)


@pytest.mark.parametrize(
    "row", [Params(), Params(temperature=0.6), Params(top_k=12), Params(top_p=0.9), Params(min_p=0.1)], ids=str
)
def test_tokens_are_drawn_as_often_as_the_softmax_says(row: Params) -> None:
    """Chi-square over 20,000 fixed seeds: 99.9 % of right implementations stay below the bound."""
    draws, rng = 20_000, np.random.default_rng(1)
    logits = (rng.standard_normal(40) * 1.5).astype(np.float32)
    tokens = run_sample(
        np.tile(logits, (draws, 1)), [replace(row, seed=seed, position=9) for seed in range(draws)], threads=2
    )
    weights = np.exp((logits.astype(np.float64) - logits.max()) / row.temperature)
    order = np.argsort(-logits, kind="stable")
    weights[order[row.top_k or len(order) :]] = 0
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= row.top_p * weights.sum()]] = 0
    weights[weights < row.min_p] = 0
    share = weights / weights.sum()
    observed = np.bincount(tokens, minlength=40)
    assert not observed[share == 0].any()
    kept = share > 0
    statistic = ((observed[kept] - draws * share[kept]) ** 2 / (draws * share[kept])).sum()
    freedom = kept.sum() - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * np.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty 1931
    assert statistic < bound


def test_seed_and_position_both_change_the_draw() -> None:
    logits = np.zeros((4, 1000), np.float32)
    rows = [
        Params(seed=1, position=2),
        Params(seed=2, position=1),
        Params(seed=1 << 32, position=2),
        Params(seed=1, position=2 << 32),
    ]
    assert len(set(run_sample(logits, rows))) == 4


def test_the_reference_has_the_words_of_the_published_vectors() -> None:
    """Random123's known answers for philox4x32-10."""
    full = 2**32 - 1
    counter = np.array([[0] * 4, [full] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]], np.uint64)
    keys = [(0, 0), (full, full), (0xA4093822, 0x299F31D0)]
    words = [philox(row, key).tolist() for row, key in zip(counter, keys, strict=True)]
    assert words == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


@pytest.mark.parametrize("name", FORMS)
def test_the_noise_of_rare_words_is_right_too(name: str) -> None:
    """A token whose u is nearly 1 wins from far behind: a float that rounded u to 1 would let it win from anywhere."""
    tokens = np.arange(2**20)
    noise = gumbel(tokens, seed=5, position=3)
    rare = int(noise.argmax())
    assert noise[rare] > 13
    others = 2**20 - 1
    for gap, token in ((noise[rare] - 0.01, rare), (noise[rare] + 0.01, None)):
        logits = np.full(2**20, -1e30, np.float32)
        logits[others], logits[rare] = 0, noise[others] - gap
        with form(name):
            (drawn,) = run_sample(logits[None], [Params(seed=5, position=3)])
        assert drawn == (others if token is None else rare)


def node_of(logits: Floats, rows: list[Params]) -> OneNode:
    """The operator for these rows."""
    return OneNode("Sample", {"logits": logits, **columns(rows)}, output=np.int64)


def test_the_operator_runs_in_the_runtime() -> None:
    rows = [
        GREEDY,
        Params(),
        Params(top_k=5, seed=-3),
        Params(top_p=0.9, position=2**40),
        Params(top_k=3, top_p=0.5, min_p=0.1),
    ]
    logits = np.random.default_rng(2).standard_normal((5, 3000), dtype=np.float32)
    assert run(node_of(logits, rows)).tolist() == run_sample(logits, rows)


def test_no_rows_are_no_tokens() -> None:
    assert run(node_of(np.zeros((0, 10), np.float32), [])).shape == (0,)


def test_a_vocabulary_of_nothing_is_refused() -> None:
    assert "vocabulary of logits is 0, must be in 1.." in failure(node_of(np.zeros((1, 0), np.float32), [GREEDY]))


def test_logits_of_another_rank_are_refused() -> None:
    assert "logits has shape [10], expected [?,?]" in failure(node_of(np.zeros(10, np.float32), [GREEDY] * 10))


def test_parameters_have_a_column_each() -> None:
    assert list(columns([GREEDY])) == [field.name for field in fields(Params)]
