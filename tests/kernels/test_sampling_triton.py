"""The sampler's kernels against the reference: under the interpreter with a small vocabulary, on a GPU with a real one.

Logarithms and sums may differ from torch's in the last bits, so a token is judged in float64 on the reference's own
scaled logits and random integers: it must be one that the filters may keep, and no token that they surely keep may
have a score above its own, each within 1e-5.  Beyond that, nearly all tokens must be the reference's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.exactness import assert_as_exact_as_eager
from tests.kernels.test_sampling import batch, chi_square, words_of
from vlmrt.kernels.sampling import (
    LogitBias,
    SamplingBatch,
    biased,
    gumbel_noise,
    logprobs_reference,
    masked,
    mix,
    penalised,
    sample_reference,
)
from vlmrt.kernels.triton.sampling import _bits, _noise, _row_key, logprobs_triton, sample_triton

TIE = 1e-5
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")


class Place(NamedTuple):
    """Where the kernels run, and how much they are given."""

    device: str
    vocab_size: int
    num_rows: int


@pytest.fixture(
    params=[
        pytest.param(Place("cpu", 1501, 3), marks=INTERPRETED, id="interpreter"),
        pytest.param(Place("cuda", 151_936, 1), marks=ON_GPU, id="gpu-one-row"),
        pytest.param(Place("cuda", 151_936, 48), marks=ON_GPU, id="gpu"),
        pytest.param(Place("cuda", 33_333, 130), marks=ON_GPU, id="gpu-odd"),
    ]
)
def place(request: pytest.FixtureRequest) -> Place:
    assert isinstance(request.param, Place)
    return request.param


def on(device: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, LogitBias):
        return LogitBias(value.token_ids.to(device), value.values.to(device), value.before.to(device))
    return value


def at(place: Place, built: SamplingBatch) -> SamplingBatch:
    return replace(built, **{name: on(place.device, getattr(built, name)) for name in SamplingBatch.__slots__})


def normal_logits(place: Place, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(place.num_rows, place.vocab_size, generator=generator) * scale).to(place.device)


def random_batch(place: Place, seed: int, **fields: Any) -> SamplingBatch:
    generator = torch.Generator().manual_seed(seed)
    rows = place.num_rows
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    positions = torch.randint(0, 5000, (rows,), generator=generator)
    per_row = {
        name: [value[i % len(value)] for i in range(rows)] if isinstance(value, list) else value
        for name, value in fields.items()
    }
    return at(place, batch(rows, **({"seeds": seeds, "positions": positions} | per_row)))


def assert_chosen_as_defined(logits: Tensor, built: SamplingBatch, num_excused: int = 1) -> Tensor:
    """Sample with the kernels and judge each token; returns them."""
    chosen = sample_triton(logits, built)
    reference = sample_reference(logits, built)
    own = built.gathered()
    source = masked(penalised(biased(logits.float(), own), own), own.grammar_mask)
    greedy = own.temperature <= 0
    scaled = source / torch.where(greedy, 1.0, own.temperature)[:, None]
    noise = exact_noise(own.seeds, own.positions, logits.shape[1])
    for row in torch.nonzero(chosen != reference)[:, 0].tolist():
        assert not greedy[row]
        possible, certain = kept(scaled[row], own, row)
        scores = scaled[row].double() + noise[row]
        token = int(chosen[row])
        assert possible[token]
        assert scores[token] >= scores[certain].max() - TIE
    assert int((chosen != reference).sum()) <= num_excused
    return chosen


def exact_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    golden = -0x61C8864680B583EB
    key = mix(mix(seeds + golden) + (positions + 1) * golden)
    token = torch.arange(1, vocab_size + 1, device=seeds.device)
    bits = (mix(key[:, None] + token * golden) >> 11) & (2**53 - 1)
    uniform = ((bits.float() + 0.5) * 2.0**-53).clamp(max=1 - 2**-24).double()
    return -torch.log(-torch.log1p(-uniform))


def kept(scaled: Tensor, built: SamplingBatch, row: int) -> tuple[Tensor, Tensor]:
    """Tokens that the filters may keep, and those that they surely keep, whatever is rounded how."""
    top_k, top_p, min_p = int(built.top_k[row]), float(built.top_p[row]), float(built.min_p[row])
    order = scaled.sort(descending=True, stable=True).indices
    ranked = scaled[order].double()
    if top_k:
        ranked[ranked < ranked[min(top_k, len(ranked)) - 1]] = float("-inf")
    probability = ranked.softmax(-1)
    preceding = probability.cumsum(0) - probability
    masks = []
    for slack in (TIE, -TIE):
        mask = ranked > float("-inf")
        if top_p < 1:
            mask &= preceding < top_p + slack
        if min_p > 0:
            mask &= probability >= min_p * probability[0] * (1 - slack)
        mask[0] = True
        masks.append(torch.zeros_like(mask).scatter_(0, order, mask))
    return masks[0], masks[1]


@triton.jit  # type: ignore[untyped-decorator]
def _noise_kernel(seeds_ptr, positions_ptr, bits_ptr, noise_ptr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    key = _row_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    token = tl.arange(0, COUNT)
    tl.store(bits_ptr + row * COUNT + token, _bits(key, token))
    tl.store(noise_ptr + row * COUNT + token, _noise(key, token))


def test_noise_comes_from_the_reference_s_integers_and_has_its_precision(place: Place) -> None:
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 77], device=place.device)
    positions = torch.tensor([0, 1, 4000, 2, 9], device=place.device)
    shape = (5, 4096)
    bits = torch.empty(shape, dtype=torch.int64, device=place.device)
    noise = torch.empty(shape, device=place.device)
    _noise_kernel[(5,)](seeds, positions, bits, noise, COUNT=4096)
    golden = -0x61C8864680B583EB
    key = mix(mix(seeds + golden) + (positions + 1) * golden)
    token = torch.arange(1, 4097, device=place.device)
    assert torch.equal(bits, (mix(key[:, None] + token * golden) >> 11) & (2**53 - 1))
    exact = exact_noise(seeds, positions, 4096)
    error = (noise - exact).abs().max()
    assert error <= 4 * (gumbel_noise(seeds, positions, 4096) - exact).abs().max()
    assert error < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_rows_take_the_first_of_the_best(place: Place, dtype: torch.dtype) -> None:
    wide = normal_logits(place._replace(vocab_size=place.vocab_size + 64), 1).to(dtype)
    logits = wide[:, : place.vocab_size]  # as cut from a padded head; its rows do not follow on one another
    wide[0, place.vocab_size :] = 1e6
    first, last = torch.randperm(place.vocab_size, generator=torch.Generator().manual_seed(2))[:2].sort().values
    logits[0, last] = logits[0, first] = 99.0
    logits[-1, place.vocab_size - 1] = 98.5 if place.num_rows > 1 else 1.0
    greedy = random_batch(place, 3, temperature=0.0, all_greedy=True)
    chosen = sample_triton(logits, greedy)
    assert chosen[0] == first
    assert torch.equal(chosen.cpu(), torch.from_numpy(logits.float().cpu().numpy().argmax(1)))
    # rows without noise are greedy in any batch
    assert torch.equal(sample_triton(logits, replace(greedy, all_greedy=False)), chosen)


NO_FILTER = {"any_top_k": False, "any_top_p": False, "any_min_p": False}
ASKED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": [0.5, 1.0, 1.7], **NO_FILTER},
    "top-k": {"top_k": [40, 1, 0, 5, 3000]},
    "top-p": {"top_p": [0.9, 0.3, 1.0, 0.999, 0.7]},
    "min-p": {"min_p": [0.05, 0.5, 0.0, 1.0], "temperature": [1.0, 2.0, 3.0]},
    "all": {
        "temperature": [0.7, 0.0, 1.5, 0.01],
        "top_k": [20, 1, 7, 1, 0],
        "top_p": [0.8, 1.0, 0.95, 0.001, 0.5],
        "min_p": [0.0, 0.0, 0.1, 0.02, 0.3, 0.2],
    },
}


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawn_tokens_are_the_reference_s(place: Place, name: str, dtype: torch.dtype) -> None:
    # bfloat16 logits are full of equals
    logits = normal_logits(place, 10).to(dtype)
    assert_chosen_as_defined(logits, random_batch(place, 11, **ASKED[name]))


def test_k_above_the_number_of_subtiles_is_found_too(place: Place) -> None:
    k = place.vocab_size // 100
    assert_chosen_as_defined(normal_logits(place, 12), random_batch(place, 13, top_k=k, top_p=0.9))


def test_penalties_and_bias_are_read_through_rows(place: Place) -> None:
    generator = torch.Generator().manual_seed(20)
    table = place.num_rows + 2
    tables = place._replace(num_rows=table)
    rows = torch.randperm(table, generator=generator)[: place.num_rows]
    token_ids = torch.stack([torch.randperm(place.vocab_size, generator=generator)[:7] for _ in range(table)])
    token_ids[0, 2:] = -1
    token_ids[1:, 5] = token_ids[1:, 4]
    values = torch.randn(table, 7, generator=generator) * 20
    values[:, 6] = float("-inf")
    built = random_batch(
        tables,
        21,
        temperature=[0.0, 0.8, 0.0, 1.0],
        top_k=[0, 0, 9],
        repetition_penalty=[1.3, 1.0, 0.7, 1.05, 1.0],
        frequency_penalty=[0.0, 0.4, -0.3, 0.0, 0.0],
        presence_penalty=[0.5, 0.0, -0.2, 0.0, 0.0],
        prompt_mask=torch.rand(table, place.vocab_size, generator=generator) < 0.3,
        output_counts=torch.randint(0, 4, (table, place.vocab_size), generator=generator, dtype=torch.int32),
        logit_bias=LogitBias(token_ids, values, torch.randint(0, 2 * place.num_rows, (table, 7), generator=generator)),
    )
    positions = torch.arange(place.num_rows)
    built = at(place, replace(built, rows=rows, positions=positions))
    logits = normal_logits(place, 22)
    chosen = assert_chosen_as_defined(logits, built)
    plain = sample_triton(logits, replace(built, logit_bias=None, prompt_mask=None, output_counts=None))
    assert place.num_rows == 1 or not torch.equal(chosen, plain)


@pytest.mark.parametrize("name", ["greedy", "temperature", "top-k", "top-p", "all"])
def test_tokens_outside_the_grammar_s_mask_are_never_chosen(place: Place, name: str) -> None:
    """With few and many tokens allowed, of which fewer than k, and with one alone."""
    generator = torch.Generator().manual_seed(25)
    table = place.num_rows + 3
    share = torch.tensor([1.0, 0.003, 0.3, 0.9])[torch.arange(table) % 4, None]
    allowed = torch.rand(table, place.vocab_size, generator=generator) < share
    alone = torch.randint(place.vocab_size, (table,), generator=generator)
    allowed[torch.arange(table), alone] = True
    allowed[1::7] = torch.arange(place.vocab_size) == alone[1::7, None]
    asked = {"temperature": 0.0, "all_greedy": True} if name == "greedy" else ASKED[name]
    wide = torch.zeros(
        table, -(-place.vocab_size // 32) + 3, dtype=torch.int32
    )  # its rows do not follow on one another
    wide[:, :-3] = words_of(allowed)
    built = random_batch(place._replace(num_rows=table), 26, **asked)
    rows = torch.randperm(table, generator=generator)[: place.num_rows].to(place.device)
    positions = torch.arange(place.num_rows, device=place.device)
    built = replace(built, grammar_mask=wide[:, :-3].to(place.device), rows=rows, positions=positions)
    chosen = assert_chosen_as_defined(normal_logits(place, 27), built)
    assert allowed.to(place.device)[rows, chosen].all()


def test_many_biases_find_their_tokens(place: Place) -> None:
    """More than are looked through at once, in every tile."""
    count = 300
    generator = torch.Generator().manual_seed(28)
    token_ids = torch.stack(
        [torch.randperm(place.vocab_size, generator=generator)[:count] for _ in range(place.num_rows)]
    )
    values = torch.full((place.num_rows, count), -100.0)
    values[:, 257] = 100.0
    bias = LogitBias(token_ids, values, torch.full_like(token_ids, 1 << 31))
    greedy = random_batch(place, 29, temperature=0.0, all_greedy=True, logit_bias=bias)
    assert torch.equal(sample_triton(normal_logits(place, 28), greedy).cpu(), token_ids[:, 257])
    forbidden = replace(greedy, logit_bias=replace(on(place.device, bias), values=on(place.device, values - 100.0)))
    chosen = assert_chosen_as_defined(normal_logits(place, 28), forbidden)
    assert not (chosen.cpu()[:, None] == token_ids[:, :257]).any()


def test_equals_at_the_edge_are_all_kept_by_top_k_and_the_first_of_them_by_top_p(place: Place) -> None:
    count = 16 if place.device == "cpu" else 3000
    logits = torch.full((place.vocab_size,), -30.0, device=place.device)
    spots = torch.randperm(place.vocab_size, generator=torch.Generator().manual_seed(30))[:6].sort().values
    logits[spots] = 1.0
    many = place._replace(num_rows=count)
    expanded = logits.expand(count, -1)
    by_k = sample_triton(expanded, random_batch(many, 31, top_k=2))
    by_p = sample_triton(expanded, random_batch(many, 31, top_p=0.45))  # 3 / 6 is the first to reach it
    assert set(by_k.tolist()) <= set(spots.tolist())
    assert set(by_k.tolist()) - set(spots[:3].tolist())
    assert set(by_p.tolist()) == set(spots[:3].tolist())


def test_extreme_rows_and_filters_still_give_a_token(place: Place) -> None:
    lonely = torch.full((place.num_rows, place.vocab_size), float("-inf"), device=place.device)
    lonely[:, place.vocab_size - 2] = -5.0
    for fields in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_p": 1e-30, "top_k": 3, "min_p": 1.0}):
        assert (sample_triton(lonely, random_batch(place, 40, **fields)) == place.vocab_size - 2).all()
    logits = normal_logits(place, 41)
    for fields in ({"top_k": 1}, {"top_p": 1e-30}, {"min_p": 1.0}, {"temperature": 1e-6}):
        assert torch.equal(sample_triton(logits, random_batch(place, 42, **fields)), logits.argmax(-1))
    flat = torch.zeros(place.num_rows, place.vocab_size, device=place.device)
    flat[:, 1::2] = -0.0
    assert_chosen_as_defined(flat, random_batch(place, 43, top_k=3, top_p=0.5))


def test_a_row_draws_the_same_at_any_place_in_any_batch(place: Place) -> None:
    logits = normal_logits(place, 50)
    built = random_batch(place, 51, **ASKED["all"])
    chosen = sample_triton(logits, built)
    order = torch.arange(place.num_rows - 1, -1, -1, device=place.device)
    moved = replace(built, rows=order, positions=built.positions[order])
    assert torch.equal(sample_triton(logits[order], moved), chosen[order])
    for row in range(min(place.num_rows, 6)):
        one = torch.tensor([row], device=place.device)
        alone = replace(built, rows=one, positions=built.positions[one])
        assert torch.equal(sample_triton(logits[one], alone), chosen[one])


@pytest.mark.parametrize(
    "fields",
    [{"temperature": 0.7}, {"top_k": 30}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 33, "top_p": 0.9, "min_p": 0.02}],
)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_draws_follow_the_filtered_softmax(fields: dict[str, float]) -> None:
    count = 40_000
    logits = torch.randn(40, generator=torch.Generator().manual_seed(60)) * 1.5
    possible, certain = kept(logits / fields.get("temperature", 1.0), batch(1, **fields), 0)
    assert torch.equal(possible, certain)
    place = Place("cuda", 40, count)
    built = at(place, batch(count, seeds=torch.arange(count) * 7919 - 5, **fields))
    chosen = sample_triton(logits.cuda().expand(count, -1), built).cpu()
    masked = (logits.double() / fields.get("temperature", 1.0)).masked_fill(~certain, float("-inf"))
    expected = masked.softmax(-1) * count
    observed = chosen.bincount(minlength=40)
    assert not observed[~certain].any()
    degrees = int(certain.sum()) - 1
    limit = degrees + 4 * (2 * degrees) ** 0.5 + 4  # four standard deviations, and a little for its skew
    assert chi_square(observed[certain], expected[certain]) < limit


def test_no_rows_give_no_tokens(place: Place) -> None:
    none = place._replace(num_rows=0)
    assert sample_triton(normal_logits(none, 1), random_batch(none, 1)).shape == (0,)
    logits = normal_logits(none, 1)
    assert logprobs_triton(logits, torch.empty(0, dtype=torch.int64, device=place.device), 3)[2].shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_as_exact_as_eager(place: Place, dtype: torch.dtype) -> None:
    logits = normal_logits(place, 70).to(dtype).float()
    token_ids = torch.randint(place.vocab_size, (place.num_rows,), generator=torch.Generator().manual_seed(71))
    token_ids = token_ids.to(place.device)
    for part in (0, 2):
        assert_as_exact_as_eager(
            lambda x, part=part: logprobs_triton(x, token_ids, 9)[part],
            lambda x, part=part: logprobs_reference(x, token_ids, 9)[part],
            logits,
        )
    chosen, top_ids, top_values = logprobs_triton(logits.to(dtype), token_ids, 9)
    values = logits.log_softmax(-1)
    assert torch.allclose(values.gather(1, top_ids), top_values, atol=1e-5)
    assert torch.allclose(values.gather(1, token_ids[:, None])[:, 0], chosen, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["greedy", *ASKED])
def test_a_captured_sampler_reads_what_stands_in_its_buffers(name: str) -> None:
    place = Place("cuda", 151_936, 16)
    asked = {"temperature": 0.0, "all_greedy": True} if name == "greedy" else ASKED[name]
    logits, built = normal_logits(place, 80), random_batch(place, 81, **asked)
    rows = torch.arange(16, device="cuda")
    built = replace(built, rows=rows)
    sample_triton(logits, built)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = sample_triton(logits, built)
    for seed in range(3):
        logits.copy_(normal_logits(place, 90 + seed))
        built.positions.random_(0, 1000)
        rows.copy_(torch.randperm(16, device="cuda"))
        graph.replay()
        first = chosen.clone()
        assert torch.equal(first, sample_triton(logits, built))
        graph.replay()
        assert torch.equal(chosen, first)
