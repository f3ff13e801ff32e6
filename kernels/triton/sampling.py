"""Sampling on the GPU in two launches: a scan of the logits by tiles, then one program per row that chooses.

The scan finds each tile's best token: of greedy rows by logit, of the others by logit / temperature + Gumbel noise.
Rows without a filter are then done but for a maximum over tiles. For rows with top-k, top-p or min-p the scan also
writes the scaled logits and, per subtile of 128 tokens, their peak and mass (sum of exp). No row is ever sorted:

- The k-th largest peak is at most the k-th largest logit, so top-k reads little more than k subtiles, and finds the
  k-th logit among them by bisection of the float's bits.
- Tokens stand in order of falling logit, equals by rising index, and the kept ones are a beginning of that order. So
  the winner among all tokens is also the winner among the kept ones if it is kept itself: its preceding mass is below
  top_p. If not, nothing from it on is kept, and the winner among those before it is next. Each turn reads only the
  subtiles whose peak reaches the candidate.

All sums of floats run in an order that depends on the row alone, the rest is maxima and integers, so that every run
and every rank chooses alike, whatever the other rows are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrt.kernels.sampling import SamplingBatch
from vlmrt.kernels.triton.compile_spec import CompileSpec

SUBTILE = tl.constexpr(128)
CHUNK = tl.constexpr(32)  # subtiles that a choosing program holds at once
BIAS_BLOCK = tl.constexpr(64)  # biased tokens that are looked through at once
NO_TOKEN = tl.constexpr(2**31 - 1)
COUNT_BITS = tl.constexpr(21)  # three counts of tokens share one int64
COUNT_MASK = tl.constexpr(2**21 - 1)
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)

# Few rows want many small tiles to fill the GPU, many rows want few. Rows with filters always have the same, because
# the order of their sums must not depend on the number of rows.
SMALL_TILE, LARGE_TILE, FILTER_TILE = 1024, 4096, 2048
FEW_ROWS = 8
SCAN_WARPS = {SMALL_TILE: 4, FILTER_TILE: 4, LARGE_TILE: 8}
CHOOSE_WARPS, FILTER_WARPS = 4, 16
USUAL_TOP = 32  # log-probabilities of a row, at least: one variant of the kernel serves all who ask for 20 or fewer


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def _row_key(seed, position):
    return _mix(_mix(seed.to(tl.uint64) + _GOLDEN) + (position.to(tl.uint64) + 1) * _GOLDEN)


@triton.jit
def _bits(key, token):
    """53 random bits."""
    return (_mix(key + (token + 1).to(tl.uint64) * _GOLDEN) >> 11).to(tl.int64)


@triton.jit
def _noise(key, token):
    uniform = (_bits(key, token).to(tl.float32) + 0.5) * 1.1102230246251565e-16  # 2**-53
    uniform = tl.minimum(uniform, 0.999999940395355224609375)  # 1 - 2**-24
    # log1p(-u) by log(1 - u), whose rounding of 1 - u the quotient takes out again: exact to a few ulp for any u.
    rest = 1.0 - uniform
    exponential = tl.where(rest == 1.0, uniform, -tl.log(rest) * (uniform / tl.where(rest == 1.0, 1.0, 1.0 - rest)))
    return -tl.log(exponential)


@triton.jit
def _ordered_key(x):
    """Integer with the order of the floats."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _float_of_key(key):
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


# What lies where in a step's inputs, and what its rows ask for, makes no other variant.
@triton.jit(
    do_not_specialize=["mask_stride", "num_bias", "has_penalties", "has_mask"],
    do_not_specialize_on_alignment=["rows_ptr", "positions_ptr"],
)
def _scan_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    repetition_ptr,
    frequency_ptr,
    presence_ptr,
    top_k_ptr,
    seeds_ptr,
    prompt_mask_ptr,
    output_counts_ptr,
    bias_ids_ptr,
    bias_values_ptr,
    bias_before_ptr,
    mask_ptr,
    best_ptr,
    token_ptr,
    scaled_ptr,
    peak_ptr,
    mass_ptr,
    logits_stride,
    float_stride,
    integer_stride,
    mask_stride,
    num_bias,
    has_penalties,
    has_mask,
    vocab_size,
    num_subtiles,
    ALL_GREEDY: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    EXTRAS: tl.constexpr,
    FILTERS: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    source = row
    if HAS_ROWS:
        source = tl.load(rows_ptr + row)
    subtile = tile * (TILE // SUBTILE) + tl.arange(0, TILE // SUBTILE)
    token = subtile[:, None] * SUBTILE + tl.arange(0, SUBTILE)[None, :]
    valid = token < vocab_size
    x = tl.load(logits_ptr + row * logits_stride + token, mask=valid, other=float("-inf")).to(tl.float32)

    # Bias, penalties and grammar are one variant of this kernel, not eight: each compiles for the first who needs it.
    if EXTRAS:
        if has_mask != 0:  # first, since nothing that follows raises -inf
            word = tl.load(mask_ptr + source * mask_stride + (token >> 5), mask=valid, other=0)
            x = tl.where(((word >> (token & 31)) & 1) != 0, x, float("-inf"))
        position = tl.load(positions_ptr + row)
        for first in range(0, num_bias, BIAS_BLOCK):
            lane = first + tl.arange(0, BIAS_BLOCK)
            biased = tl.load(bias_ids_ptr + source * num_bias + lane, mask=lane < num_bias, other=-1)
            if tl.sum(((biased >= tile * TILE) & (biased < (tile + 1) * TILE)).to(tl.int32)) > 0:
                for i in range(first, tl.minimum(first + BIAS_BLOCK, num_bias)):
                    biased_token = tl.load(bias_ids_ptr + source * num_bias + i)
                    value = tl.load(bias_values_ptr + source * num_bias + i)
                    holds = position < tl.load(bias_before_ptr + source * num_bias + i)
                    x = tl.where((token == biased_token) & holds, x + value, x)

        if has_penalties != 0:
            repetition = tl.load(repetition_ptr + source * float_stride)
            frequency = tl.load(frequency_ptr + source * float_stride)
            presence = tl.load(presence_ptr + source * float_stride)
            if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
                in_prompt = tl.load(prompt_mask_ptr + source * vocab_size + token, mask=valid, other=0) != 0
                count = tl.load(output_counts_ptr + source * vocab_size + token, mask=valid, other=0)
                penalty = tl.where(in_prompt | (count > 0), repetition, 1.0)
                x = tl.where(x > 0, tl.div_rn(x, penalty), x * penalty)
                x = x - frequency * count.to(tl.float32)
                x = x - presence * (count > 0).to(tl.float32)

    score = x
    if not ALL_GREEDY:
        temperature = tl.load(temperature_ptr + source * float_stride)
        if temperature > 0:
            x = tl.div_rn(x, temperature)
            x = tl.where(x == 0, 0.0, x)  # -0 becomes 0: their bits must not differ where bits are compared
            wants_noise = True
            if FILTERS:
                top_k = tl.load(top_k_ptr + source * integer_stride)
                top_p = tl.load(top_p_ptr + source * float_stride)
                min_p = tl.load(min_p_ptr + source * float_stride)
                wants_noise = (top_k <= 0) | (top_k >= vocab_size)  # else drawn among the k alone
                if (not wants_noise) | (top_p < 1) | (min_p > 0):
                    peak = tl.max(x, axis=1)
                    finite_peak = tl.where(peak > float("-inf"), peak, 0.0)
                    mass = tl.sum(tl.exp(x - finite_peak[:, None]), axis=1)
                    inside = subtile < num_subtiles
                    tl.store(scaled_ptr + row * vocab_size + token, x, mask=valid)
                    tl.store(peak_ptr + row * num_subtiles + subtile, peak, mask=inside)
                    tl.store(mass_ptr + row * num_subtiles + subtile, mass, mask=inside)
            score = x
            if wants_noise:
                score = x + _noise(
                    _row_key(tl.load(seeds_ptr + source * integer_stride), tl.load(positions_ptr + row)), token
                )

    best = tl.max(score)
    first = tl.min(tl.where(score == best, token, NO_TOKEN))
    tl.store(best_ptr + row * tl.num_programs(0) + tile, best)
    tl.store(token_ptr + row * tl.num_programs(0) + tile, first)


@triton.jit
def _load_chunk(values_ptr, list_ptr, first, num, size, LISTED: tl.constexpr):
    """Indices, values and validity of a chunk of subtiles; without a list, subtile i is the i-th."""
    entry = first + tl.arange(0, CHUNK)
    subtile = entry
    if LISTED:
        subtile = tl.load(list_ptr + entry, mask=entry < num, other=0)
    index = subtile[:, None] * SUBTILE + tl.arange(0, SUBTILE)[None, :]
    valid = (entry < num)[:, None] & (index < size)
    return index, tl.load(values_ptr + index, mask=valid, other=float("-inf")), valid


@triton.jit
def _kth_largest(values_ptr, list_ptr, num, size, k, low, high, slack, LISTED: tl.constexpr):
    """A value that k to k + slack of the values reach (or more, if equals make it so), found in [low, high].

    Three pivots a turn cut the range of the floats' bits by four.
    """
    low_key = _ordered_key(low)
    high_key = _ordered_key(high) + 1  # reached by fewer than k
    num_reaching = k + slack + 1
    while (high_key - low_key > 1) & (num_reaching > k + slack):
        step = (high_key - low_key + 3) // 4
        pivot_1 = low_key + step
        pivot_2 = tl.minimum(pivot_1 + step, high_key)
        pivot_3 = tl.minimum(pivot_2 + step, high_key)
        value_1 = _float_of_key(pivot_1)
        value_2 = _float_of_key(pivot_2)
        value_3 = _float_of_key(pivot_3)
        counts = tl.zeros([CHUNK, SUBTILE], tl.int64)
        for first in range(0, num, CHUNK):
            _, x, _ = _load_chunk(values_ptr, list_ptr, first, num, size, LISTED)
            counts += (x >= value_1).to(tl.int64)
            counts += (x >= value_2).to(tl.int64) << COUNT_BITS
            counts += (x >= value_3).to(tl.int64) << (2 * COUNT_BITS)
        total = tl.sum(counts)
        count_1 = total & COUNT_MASK
        count_2 = (total >> COUNT_BITS) & COUNT_MASK
        count_3 = total >> (2 * COUNT_BITS)
        if count_3 >= k:
            low_key = pivot_3
            num_reaching = count_3
        elif count_2 >= k:
            low_key = pivot_2
            high_key = pivot_3
            num_reaching = count_2
        elif count_1 >= k:
            low_key = pivot_1
            high_key = pivot_2
            num_reaching = count_1
        else:
            high_key = pivot_1
    return _float_of_key(low_key)


@triton.jit
def _list_subtiles(peak_ptr, list_ptr, num_subtiles, threshold, SUBTILES: tl.constexpr):
    """Write down the subtiles whose peak reaches a threshold; returns how many."""
    subtile = tl.arange(0, SUBTILES)
    peak = tl.load(peak_ptr + subtile, mask=subtile < num_subtiles, other=float("-inf"))
    listed = (peak >= threshold) & (subtile < num_subtiles)
    place = tl.cumsum(listed.to(tl.int32), axis=0) - 1
    tl.debug_barrier()  # the list before is read to its end
    tl.store(list_ptr + place, subtile, mask=listed)
    tl.debug_barrier()
    return tl.sum(listed.to(tl.int32))


@triton.jit
def _preceding(values_ptr, list_ptr, num, size, lowest, value, token, peak):
    """How many tokens of the list reach lowest and stand before a token, and their mass relative to the peak."""
    counts = tl.zeros([CHUNK, SUBTILE], tl.int32)
    masses = tl.zeros([CHUNK, SUBTILE], tl.float64)
    for first in range(0, num, CHUNK):
        index, x, valid = _load_chunk(values_ptr, list_ptr, first, num, size, True)
        before = valid & (x >= lowest) & ((x > value) | ((x == value) & (index < token)))
        counts += before.to(tl.int32)
        masses += tl.where(before, tl.exp(x - peak), 0.0).to(tl.float64)
    return tl.sum(counts), tl.sum(masses)


@triton.jit
def _winner(values_ptr, list_ptr, num, size, lowest, value, token, key):
    """The best noisy token of the list among those that reach lowest and stand before a token; NO_TOKEN if none."""
    scores = tl.full([CHUNK, SUBTILE], float("-inf"), tl.float32)
    tokens = tl.full([CHUNK, SUBTILE], NO_TOKEN, tl.int32)
    for first in range(0, num, CHUNK):
        index, x, valid = _load_chunk(values_ptr, list_ptr, first, num, size, True)
        before = valid & (x >= lowest) & ((x > value) | ((x == value) & (index < token)))
        score = x + _noise(key, index)
        better = before & ((score > scores) | ((score == scores) & (index < tokens)))
        scores = tl.where(better, score, scores)
        tokens = tl.where(better, index, tokens)
    return tl.min(tl.where(scores == tl.max(scores), tokens, NO_TOKEN))


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "positions_ptr"])
def _choose_kernel(
    best_ptr,
    token_ptr,
    scaled_ptr,
    peak_ptr,
    mass_ptr,
    list_ptr,
    rows_ptr,
    positions_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    top_k_ptr,
    seeds_ptr,
    chosen_ptr,
    float_stride,
    integer_stride,
    num_tiles,
    vocab_size,
    num_subtiles,
    HAS_ROWS: tl.constexpr,
    FILTERS: tl.constexpr,
    TILES: tl.constexpr,
    SUBTILES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    score = tl.load(best_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf"))
    first = tl.load(token_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=NO_TOKEN)
    chosen = tl.min(tl.where(score == tl.max(score), first, NO_TOKEN))
    chosen = tl.minimum(chosen, vocab_size - 1)  # logits that are not numbers still give a token
    if FILTERS:
        source = row
        if HAS_ROWS:
            source = tl.load(rows_ptr + row)
        temperature = tl.load(temperature_ptr + source * float_stride)
        top_p = tl.load(top_p_ptr + source * float_stride)
        min_p = tl.load(min_p_ptr + source * float_stride)
        top_k = tl.load(top_k_ptr + source * integer_stride)
        limits_k = (top_k > 0) & (top_k < vocab_size)
        if (temperature > 0) & (limits_k | (top_p < 1) | (min_p > 0)):
            key = _row_key(tl.load(seeds_ptr + source * integer_stride), tl.load(positions_ptr + row))
            scaled_ptr += row * vocab_size
            peak_ptr += row * num_subtiles
            list_ptr += row * num_subtiles
            subtile = tl.arange(0, SUBTILES)
            inside = subtile < num_subtiles
            peaks = tl.load(peak_ptr + subtile, mask=inside, other=float("-inf"))
            top = tl.max(peaks)
            kth = tl.full((), float("-inf"), tl.float32)
            floor = kth
            if min_p > 0:
                floor = top + tl.log(min_p)
            kept = top.to(tl.float64)
            if limits_k:
                num_peaks = tl.cdiv(num_subtiles, SUBTILE)
                lowest_peak = tl.min(tl.where(inside, peaks, top))
                low = tl.where(top_k <= num_subtiles, lowest_peak, float("-inf"))
                slack = top_k // 4 + 4
                bound = _kth_largest(peak_ptr, list_ptr, num_peaks, num_subtiles, top_k, low, top, slack, False)
                num = _list_subtiles(peak_ptr, list_ptr, num_subtiles, bound, SUBTILES)
                kth = _kth_largest(scaled_ptr, list_ptr, num, vocab_size, top_k, bound, top, 0, True)
                _, kept = _preceding(scaled_ptr, list_ptr, num, vocab_size, kth, float("-inf"), NO_TOKEN, top)
                lowest = tl.maximum(kth, floor)
                chosen = _winner(scaled_ptr, list_ptr, num, vocab_size, lowest, float("-inf"), NO_TOKEN, key)
                chosen = tl.minimum(chosen, vocab_size - 1)
            else:
                masses = tl.load(mass_ptr + row * num_subtiles + subtile, mask=inside, other=0.0)
                kept = tl.sum(masses.to(tl.float64) * tl.exp(peaks - top).to(tl.float64))
            value = tl.load(scaled_ptr + chosen)
            lowest = tl.maximum(kth, floor)
            done = (top_p >= 1) & (value >= floor)
            while not done:
                num = _list_subtiles(peak_ptr, list_ptr, num_subtiles, tl.maximum(value, lowest), SUBTILES)
                if value >= floor:
                    count, mass = _preceding(scaled_ptr, list_ptr, num, vocab_size, kth, value, chosen, top)
                    done = (count == 0) | (mass < top_p.to(tl.float64) * kept)
                if not done:
                    better = _winner(scaled_ptr, list_ptr, num, vocab_size, lowest, value, chosen, key)
                    done = better == NO_TOKEN
                    if not done:
                        chosen = better
                        value = tl.load(scaled_ptr + chosen)
                        done = (top_p >= 1) & (value >= floor)
    tl.store(chosen_ptr + row, chosen.to(tl.int64))


def sample_triton(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """kernels.sampling.sample on the GPU; float32 or bfloat16 logits."""
    num_rows, vocab_size = logits.shape
    chosen = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if not num_rows:
        return chosen
    assert logits.stride(1) == 1
    assert vocab_size < 2**COUNT_BITS.value
    filters = not batch.all_greedy and (batch.any_top_k or batch.any_top_p or batch.any_min_p)
    tile = FILTER_TILE if filters else SMALL_TILE if num_rows <= FEW_ROWS else LARGE_TILE
    num_tiles = triton.cdiv(vocab_size, tile)
    num_subtiles = triton.cdiv(vocab_size, SUBTILE.value)

    def scratch(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((num_rows, width), dtype=dtype, device=logits.device)

    best, tokens = scratch(num_tiles, torch.float32), scratch(num_tiles, torch.int32)
    scaled = scratch(vocab_size, torch.float32) if filters else None
    peaks, masses = (scratch(num_subtiles, torch.float32) if filters else None for _ in range(2))
    listed = scratch(num_subtiles, torch.int32) if filters else None
    mask, counts, bias, words = batch.prompt_mask, batch.output_counts, batch.logit_bias, batch.grammar_mask
    floats = (
        batch.temperature,
        batch.top_p,
        batch.min_p,
        batch.repetition_penalty,
        batch.frequency_penalty,
        batch.presence_penalty,
    )
    float_stride, integer_stride = batch.temperature.stride(0), batch.top_k.stride(0)
    assert all(field.stride(0) == float_stride for field in floats)
    assert batch.seeds.stride(0) == integer_stride
    penalties = mask is not None and counts is not None
    assert not penalties or (
        mask is not None and mask.is_contiguous() and counts is not None and counts.is_contiguous()
    )
    assert bias is None or all(each.is_contiguous() for each in (bias.token_ids, bias.values, bias.before))
    assert words is None or words.stride(1) == 1
    num_bias = 0 if bias is None else bias.token_ids.shape[1]
    extras = penalties or num_bias > 0 or words is not None

    def given(table: Tensor | None, other: Tensor | None) -> Tensor | None:
        """Where no row has extras nothing, and where some do any tensor of the type, so that one variant serves all."""
        return None if not extras else other if table is None else table

    # Products and sums are rounded one by one, as eager operations do it.
    _scan_kernel[(num_tiles, num_rows)](
        logits,
        batch.rows,
        batch.positions,
        *floats,
        batch.top_k,
        batch.seeds,
        given(None if mask is None else mask.view(torch.uint8), tokens.view(torch.uint8)),
        given(counts, tokens),
        given(None if bias is None else bias.token_ids, chosen),
        given(None if bias is None else bias.values, best),
        given(None if bias is None else bias.before, chosen),
        given(words, tokens),
        best,
        tokens,
        scaled,
        peaks,
        masses,
        logits.stride(0),
        float_stride,
        integer_stride,
        0 if words is None else words.stride(0),
        num_bias,
        int(penalties),
        int(words is not None),
        vocab_size,
        num_subtiles,
        ALL_GREEDY=batch.all_greedy,
        HAS_ROWS=batch.rows is not None,
        EXTRAS=extras,
        FILTERS=filters,
        TILE=tile,
        num_warps=SCAN_WARPS[tile],
        enable_fp_fusion=False,
    )
    _choose_kernel[(num_rows,)](
        best,
        tokens,
        scaled,
        peaks,
        masses,
        listed,
        batch.rows,
        batch.positions,
        *floats[:3],
        batch.top_k,
        batch.seeds,
        chosen,
        float_stride,
        integer_stride,
        num_tiles,
        vocab_size,
        num_subtiles,
        HAS_ROWS=batch.rows is not None,
        FILTERS=filters,
        TILES=triton.next_power_of_2(num_tiles),
        SUBTILES=triton.next_power_of_2(num_subtiles),
        num_warps=FILTER_WARPS if filters else CHOOSE_WARPS,
        enable_fp_fusion=False,
    )
    return chosen


@triton.jit
def _mass_kernel(logits_ptr, peak_ptr, mass_ptr, logits_stride, vocab_size, TILE: tl.constexpr):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits_ptr + row * logits_stride + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    peak = tl.max(x)
    mass = tl.sum(tl.exp(x - tl.where(peak > float("-inf"), peak, 0.0)))
    tl.store(peak_ptr + row * tl.num_programs(0) + tile, peak)
    tl.store(mass_ptr + row * tl.num_programs(0) + tile, mass)


@triton.jit(do_not_specialize=["num_top"])
def _logprob_kernel(
    logits_ptr,
    peak_ptr,
    mass_ptr,
    token_ids_ptr,
    chosen_ptr,
    top_ptr,
    top_logprob_ptr,
    logits_stride,
    num_tiles,
    num_top,
    TILES: tl.constexpr,
    TOP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    peaks = tl.load(peak_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=float("-inf"))
    masses = tl.load(mass_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=0.0)
    peak = tl.max(peaks)
    log_mass = tl.log(tl.sum(masses * tl.exp(peaks - peak)))
    chosen = tl.load(logits_ptr + row * logits_stride + tl.load(token_ids_ptr + row)).to(tl.float32)
    tl.store(chosen_ptr + row, chosen - peak - log_mass)
    place = row * num_top + tl.arange(0, TOP)
    inside = tl.arange(0, TOP) < num_top
    top = tl.load(top_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(top_logprob_ptr + place, top - peak - log_mass, mask=inside)


def logprobs_triton(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """kernels.sampling.logprobs on the GPU."""
    num_rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, LARGE_TILE)
    top, top_ids = logits.topk(num_top, dim=-1)
    peaks, masses = torch.empty((2, num_rows, num_tiles), dtype=torch.float32, device=logits.device).unbind()
    chosen = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    top_logprobs = torch.empty((num_rows, num_top), dtype=torch.float32, device=logits.device)
    if num_rows:
        assert logits.stride(1) == 1
        _mass_kernel[(num_tiles, num_rows)](
            logits, peaks, masses, logits.stride(0), vocab_size, TILE=LARGE_TILE, num_warps=SCAN_WARPS[LARGE_TILE]
        )
        _logprob_kernel[(num_rows,)](
            logits,
            peaks,
            masses,
            token_ids,
            chosen,
            top,
            top_logprobs,
            logits.stride(0),
            num_tiles,
            num_top,
            TILES=triton.next_power_of_2(num_tiles),
            TOP=max(USUAL_TOP, triton.next_power_of_2(num_top)),
            num_warps=CHOOSE_WARPS,
        )
    return chosen, top_ids, top_logprobs


def compile_specs() -> list[CompileSpec]:
    """Greedy, drawn without filters, and with all that a row can ask for; at the vocabulary of a 2B model."""
    vocab_size = 151_936
    types = {
        "logits_ptr": "*bf16",
        "top_k_ptr": "*i64",
        "seeds_ptr": "*i64",
        "rows_ptr": "*i64",
        "positions_ptr": "*i64",
        "prompt_mask_ptr": "*u8",
        "output_counts_ptr": "*i32",
        "bias_ids_ptr": "*i64",
        "bias_before_ptr": "*i64",
        "mask_ptr": "*i32",
        "token_ptr": "*i32",
        "list_ptr": "*i32",
        "chosen_ptr": "*i64",
        "token_ids_ptr": "*i64",
        "top_ptr": "*bf16",
    }

    def spec(name: str, kernel: Any, num_warps: int, **constants: object) -> CompileSpec:
        def type_of(parameter: str) -> str:
            if parameter in constants:
                return "constexpr"
            return types.get(parameter, "*fp32") if parameter.endswith("_ptr") else "i32"

        return CompileSpec(name, kernel, {each: type_of(each) for each in kernel.arg_names}, constants, num_warps, 3)

    def scan(name: str, tile: int, greedy: bool, extras: bool, filters: bool = False) -> CompileSpec:
        return spec(
            f"sampling_scan_{name}",
            _scan_kernel,
            SCAN_WARPS[tile],
            ALL_GREEDY=greedy,
            HAS_ROWS=True,
            EXTRAS=extras,
            FILTERS=filters,
            TILE=tile,
        )

    def choose(name: str, tile: int, filters: bool, num_warps: int) -> CompileSpec:
        return spec(
            f"sampling_choose_{name}",
            _choose_kernel,
            num_warps,
            HAS_ROWS=True,
            FILTERS=filters,
            TILES=triton.next_power_of_2(triton.cdiv(vocab_size, tile)),
            SUBTILES=triton.next_power_of_2(triton.cdiv(vocab_size, SUBTILE.value)),
        )

    tiles = triton.next_power_of_2(triton.cdiv(vocab_size, LARGE_TILE))
    return [
        scan("greedy_few_rows", SMALL_TILE, True, False),
        scan("greedy", LARGE_TILE, True, False),
        scan("drawn", LARGE_TILE, False, False),
        scan("greedy_extras", LARGE_TILE, True, True),
        scan("everything", FILTER_TILE, False, True, True),
        choose("best", SMALL_TILE, False, CHOOSE_WARPS),
        choose("filtered", FILTER_TILE, True, FILTER_WARPS),
        spec("sampling_mass", _mass_kernel, SCAN_WARPS[LARGE_TILE], TILE=LARGE_TILE),
        spec("sampling_logprob", _logprob_kernel, CHOOSE_WARPS, TILES=tiles, TOP=USUAL_TOP),
    ]
