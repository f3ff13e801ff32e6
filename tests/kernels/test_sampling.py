"""Draws: their distribution, their filters and what they depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.exactness import normal
from vlmrt.kernels.sampling import LogitBias, SamplingBatch, gumbel_noise, logprobs, mix, sample

CHI_SQUARE_39 = 62.4  # a statistic with 39 degrees of freedom exceeds it once in a hundred times

FIELDS: dict[str, tuple[float, torch.dtype]] = {
    "temperature": (1.0, torch.float32),
    "top_p": (1.0, torch.float32),
    "top_k": (0, torch.int64),
    "min_p": (0.0, torch.float32),
    "repetition_penalty": (1.0, torch.float32),
    "frequency_penalty": (0.0, torch.float32),
    "presence_penalty": (0.0, torch.float32),
}


def batch(rows: int, **fields: Any) -> SamplingBatch:
    """A batch in which a field is a number for all rows, or a list of one for each."""
    filled: dict[str, Any] = {"prompt_mask": None, "output_counts": None, "all_greedy": False}
    for name, (default, dtype) in FIELDS.items():
        value = fields.pop(name, default)
        filled[name] = torch.tensor(value if isinstance(value, list) else [value] * rows, dtype=dtype)
    filled["seeds"] = torch.arange(rows)
    filled["positions"] = torch.zeros(rows, dtype=torch.int64)
    return SamplingBatch(**(filled | fields))


def draws(logits: Tensor, count: int, **fields: Any) -> Tensor:
    """Tokens drawn from one row of logits at output positions 0 .. count - 1 of one seed."""
    positions = torch.arange(count)
    seeds = torch.full((count,), 1234)
    return sample(logits.expand(count, -1), batch(count, seeds=seeds, positions=positions, **fields))


def chi_square(observed: Tensor, expected: Tensor) -> float:
    return float(((observed - expected).square() / expected).sum())


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_draws_follow_the_softmax_of_the_logits(temperature: float) -> None:
    logits = normal(40).mul(1.5)
    count = 40_000
    observed = draws(logits, count, temperature=temperature).bincount(minlength=40)
    expected = (logits.double() / temperature).softmax(-1) * count
    assert chi_square(observed, expected) < CHI_SQUARE_39


def test_draws_of_different_seeds_at_one_position_follow_the_softmax_too() -> None:
    logits = normal(40)
    count = 40_000
    tokens = sample(logits.expand(count, -1), batch(count, seeds=torch.arange(count) - count // 2))
    expected = logits.double().softmax(-1) * count
    assert chi_square(tokens.bincount(minlength=40), expected) < CHI_SQUARE_39


def test_a_draw_depends_on_seed_and_position_and_not_on_its_batch() -> None:
    logits = normal(64, 300)
    seeds, positions = torch.arange(64) * 7919, torch.arange(64) % 5
    together = sample(logits, batch(64, seeds=seeds, positions=positions, top_p=0.9))
    for row in (0, 13, 63):
        alone = batch(1, seeds=seeds[row : row + 1], positions=positions[row : row + 1], top_p=0.9)
        assert sample(logits[row : row + 1], alone) == together[row]
    assert len(set(draws(normal(300), 64).tolist())) > 20


def test_noise_is_the_same_integers_everywhere() -> None:
    # SplitMix64's own published sequence from state 0
    state = torch.tensor([1, 2, 3]) * -0x61C8864680B583EB
    assert [value % 2**64 for value in mix(state).tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    noise = gumbel_noise(torch.tensor([0, 2**62]), torch.tensor([0, 5]), 50_000)
    assert noise.isfinite().all()
    assert noise.double().mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.double().var() == pytest.approx(1.6449, abs=0.05)


def test_temperature_zero_takes_the_best_token_and_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 2.0, 1.0]])
    assert sample(logits, batch(3, temperature=0.0, all_greedy=True)).tolist() == [1, 0, 2]
    mixed = batch(3, temperature=[0.0, 0.0, 1.0], top_k=[0, 0, 1])
    assert sample(logits, mixed).tolist() == [1, 0, 2]


def kept(logits: Tensor, **fields: Any) -> set[int]:
    return set(draws(logits, 3000, **fields).tolist())


def test_filters_keep_what_they_promise() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()
    assert kept(logits) == {0, 1, 2, 3, 4}
    assert kept(logits, top_k=2) == {0, 1}
    assert kept(logits, top_k=4) == {0, 1, 2, 3, 4}  # equals of the last one stay
    assert kept(logits, top_k=99) == {0, 1, 2, 3, 4}
    assert kept(logits, top_p=0.7) == {0, 1}
    assert kept(logits, top_p=0.8) == {0, 1, 2}
    assert kept(logits, top_p=1e-6) == {0}
    assert kept(logits, min_p=0.2) == {0, 1, 2}
    assert kept(logits, min_p=1.0) == {0}
    assert kept(logits, top_k=3, top_p=0.8, min_p=0.3) == {0, 1}  # 0.5 and 0.25 of 0.875 reach 0.8
    assert kept(logits, temperature=0.5, top_p=0.9) == {0, 1}  # top-p sees the sharpened 16:4:1


def test_a_filter_of_one_row_does_not_touch_another() -> None:
    logits = normal(20).expand(2000, -1)
    fields = {"seeds": torch.arange(2000), "positions": torch.zeros(2000, dtype=torch.int64)}
    plain = sample(logits, batch(2000, **fields))
    half = sample(logits, batch(2000, top_k=[1, 0] * 1000, **fields))
    assert torch.equal(half[1::2], plain[1::2])
    assert (half[::2] == logits[0].argmax()).all()


def test_steps_that_no_row_needs_can_be_skipped() -> None:
    logits = normal(50, 30)
    skipped = {"any_top_k": False, "any_top_p": False, "any_min_p": False}
    assert torch.equal(sample(logits, batch(50)), sample(logits, batch(50, **skipped)))


def test_penalties_are_applied_in_order_to_prompt_and_output() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, 2.1, 0.0]])
    penalised = {
        "prompt_mask": torch.tensor([[True, True, False, False, False]]),
        "output_counts": torch.tensor([[0, 0, 3, 1, 0]], dtype=torch.int32),
        "temperature": 0.0,
        "all_greedy": True,
    }
    assert sample(logits, batch(1, **penalised)).item() == 3
    assert sample(logits, batch(1, **penalised, frequency_penalty=0.2)).item() == 0
    assert sample(logits, batch(1, **penalised, presence_penalty=0.2)).item() == 0
    assert sample(logits, batch(1, **penalised, repetition_penalty=1e6)).item() == 3
    # 2 / 4 = 0.5, -2 * 4 = -8, 2 / 4 - 3 * 0.5 = -1, 2.1 / 4 - 0.5 = 0.025, 0
    assert sample(logits, batch(1, **penalised, repetition_penalty=4.0, frequency_penalty=0.5)).item() == 0


def test_a_bias_is_added_to_the_logits_before_all_else() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 2.5], [1.0, 2.0, 3.0, 2.5]])
    bias = LogitBias(
        torch.tensor([[0, 2, -1], [-1, -1, -1]]),
        torch.tensor([[1.6, -100.0, 9.0], [9.0, 9.0, 9.0]]),
        torch.full((2, 3), 2**31 - 1),
    )
    greedy = {"temperature": 0.0, "all_greedy": True, "logit_bias": bias}
    assert sample(logits, batch(2, **greedy)).tolist() == [0, 2]
    # 1 + 1.6 is positive when the penalty divides it by 1.1: 2.36 is below 2.5
    seen = {"prompt_mask": torch.tensor([[True, False, False, False]] * 2), "output_counts": torch.zeros(2, 4).int()}
    assert sample(logits, batch(2, **greedy, **seen, repetition_penalty=1.1)).tolist() == [3, 2]
    drawn = sample(
        logits[:1].expand(500, -1),
        batch(500, logit_bias=rows_of(bias, torch.zeros(500, dtype=torch.int64))),
    )
    assert set(drawn.tolist()) == {0, 1, 3}


def rows_of(bias: LogitBias, rows: Tensor) -> LogitBias:
    return LogitBias(bias.token_ids[rows], bias.values[rows], bias.before[rows])


def test_biases_of_one_token_add_up_for_as_long_as_each_holds() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(4, -1)
    infinite = float("-inf")
    bias = LogitBias(
        torch.tensor([[0, 1, 1, 0]]), torch.tensor([[infinite, 1.0, -3.0, 9.0]]), torch.tensor([[3, 99, 2, 1]])
    )
    bias = rows_of(bias, torch.zeros(4, dtype=torch.int64))
    greedy = batch(4, temperature=0.0, all_greedy=True, positions=torch.arange(4), logit_bias=bias)
    # banned at 0, 1 and 2, whatever is added; then 2 against 1 + 1, the first of equals
    assert sample(logits, greedy).tolist() == [2, 2, 1, 0]


def words_of(allowed: Tensor) -> Tensor:
    """Bit t % 32 of word t // 32: whether token t is allowed, the bits past the vocabulary set."""
    rows, vocab_size = allowed.shape
    bits = torch.ones(rows, -(-vocab_size // 32) * 32, dtype=torch.int64)
    bits[:, :vocab_size] = allowed
    return (bits.view(rows, -1, 32) << torch.arange(32)).sum(-1).to(torch.int32)


def test_only_tokens_of_the_grammar_s_mask_are_chosen() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = normal(6, 70)
    allowed = torch.rand(6, 70, generator=generator) < 0.1
    allowed[0] = torch.arange(70) == 31  # the sign bit of a word
    allowed[1] = torch.arange(70) == 69
    allowed[2] = True
    words = words_of(allowed)
    best = logits.masked_fill(~allowed, float("-inf")).argmax(-1)
    assert torch.equal(sample(logits, batch(6, temperature=0.0, all_greedy=True, grammar_mask=words)), best)
    assert torch.equal(sample(logits, batch(6, top_k=1, grammar_mask=words)), best)
    for position in range(50):
        drawn = batch(6, positions=torch.full((6,), position), top_p=0.9, grammar_mask=words)
        chosen = sample(logits, drawn)
        assert allowed[torch.arange(6), chosen].all()
        unmasked = sample(logits, batch(6, positions=torch.full((6,), position), top_p=0.9))
        assert chosen[2] == unmasked[2]


def test_a_mask_comes_after_bias_and_penalties_and_is_read_through_rows() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    allowed = torch.tensor([[True] * 4, [True, True, False, False]])
    bias = LogitBias(torch.tensor([[3], [3]]), torch.tensor([[100.0], [100.0]]), torch.full((2, 1), 9))
    built = batch(2, temperature=0.0, all_greedy=True, grammar_mask=words_of(allowed), logit_bias=bias)
    for row, best in ((0, 3), (1, 1)):
        one = replace(built, rows=torch.tensor([row]), positions=torch.zeros(1, dtype=torch.int64))
        assert sample(logits, one).tolist() == [best]


def test_rows_choose_the_fields_of_a_batch() -> None:
    logits = normal(3, 50)
    fields: dict[str, list[float]] = {
        "temperature": [0.0, 1.0, 0.7, 2.0],
        "top_p": [1.0, 0.9, 1.0, 0.5],
        "top_k": [0, 5, 9, 0],
    }
    seeds, rows, positions = torch.tensor([5, 6, 7, 8]), torch.tensor([3, 0, 2]), torch.arange(3)
    table = replace(batch(4, seeds=seeds, positions=positions, **fields), rows=rows)
    own = {name: [values[row] for row in rows.tolist()] for name, values in fields.items()}
    assert torch.equal(sample(logits, table), sample(logits, batch(3, seeds=seeds[rows], positions=positions, **own)))


def test_logprobs_are_those_of_the_softmax() -> None:
    logits = normal(4, 60)
    exact = logits.double().softmax(-1).log()
    token_ids = torch.tensor([3, 0, 59, 7])
    chosen, top_ids, top_values = logprobs(logits, token_ids, 5)
    assert torch.allclose(chosen.double(), exact[torch.arange(4), token_ids], atol=1e-6)
    assert torch.equal(top_ids, exact.argsort(dim=-1, descending=True)[:, :5])
    assert torch.allclose(top_values.double(), exact.gather(1, top_ids), atol=1e-6)
    assert logprobs(logits, token_ids, 0)[1].shape == (4, 0)
