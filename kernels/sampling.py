"""Filtering of logits and a draw that depends on the row's seed and output position only."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, odd, as a signed 64-bit integer
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15
_LARGEST_BELOW_ONE = 1 - 2**-24


@dataclass(frozen=True, slots=True)
class LogitBias:
    """What is added to single logits of each row, B at most; several values for one token add up."""

    token_ids: Tensor  # int64 [R, B]; -1: no token
    values: Tensor  # float32 [R, B]; -inf: the token cannot be chosen
    before: Tensor  # int64 [R, B]: holds for output positions below it


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How each of R rows is sampled. A row with temperature 0 takes its best token, whatever its other fields.

    With rows, the fields are tables that may have more rows than the batch: all but positions and rows itself.
    """

    temperature: Tensor  # float32 [R]; 0: greedy
    top_p: Tensor  # float32 [R]; 1: off
    top_k: Tensor  # int64 [R]; 0: off
    min_p: Tensor  # float32 [R]; 0: off
    repetition_penalty: Tensor  # float32 [R]; 1: off
    frequency_penalty: Tensor  # float32 [R]; 0: off
    presence_penalty: Tensor  # float32 [R]; 0: off
    seeds: Tensor  # int64 [R]
    positions: Tensor  # int64 [R]: index of the token to draw among the request's output tokens
    prompt_mask: Tensor | None  # bool [R, V]: token occurs in the prompt; None: no row has a penalty
    output_counts: Tensor | None  # int32 [R, V]: times the token was generated; None: no row has a penalty
    all_greedy: bool
    # Known on the host; false skips a step that no row needs.
    any_top_k: bool = True
    any_top_p: bool = True
    any_min_p: bool = True
    logit_bias: LogitBias | None = None  # None: no row has one
    # int32 [R, ceil(V / 32)]; bit t % 32 of word t // 32 is clear: token t cannot be chosen; None: no row has a grammar
    grammar_mask: Tensor | None = None
    rows: Tensor | None = None  # int64 [R]: where in the fields each row of the batch finds its own; None: at its index

    def gathered(self) -> "SamplingBatch":
        """The same batch with one row of each field for each of its own."""
        rows = self.rows
        if rows is None:
            return self
        mask, counts, bias, words = self.prompt_mask, self.output_counts, self.logit_bias, self.grammar_mask
        return replace(
            self,
            temperature=self.temperature[rows],
            top_p=self.top_p[rows],
            top_k=self.top_k[rows],
            min_p=self.min_p[rows],
            repetition_penalty=self.repetition_penalty[rows],
            frequency_penalty=self.frequency_penalty[rows],
            presence_penalty=self.presence_penalty[rows],
            seeds=self.seeds[rows],
            prompt_mask=None if mask is None else mask[rows],
            output_counts=None if counts is None else counts[rows],
            logit_bias=None if bias is None else LogitBias(bias.token_ids[rows], bias.values[rows], bias.before[rows]),
            grammar_mask=None if words is None else words[rows],
            rows=None,
        )


def mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers that changes about half of the bits for any change of the input.

    int64 -> int64, wrapping. Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), variant 13 of Stafford.
    """
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift that fills with zeros; torch's fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise, a function of (seed, position, token) alone.

    Shapes: int64 [R], int64 [R] -> float32 [R, vocab_size].
    """
    key = mix(mix(seeds + _GOLDEN) + (positions + 1) * _GOLDEN)
    token = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=seeds.device)
    bits = mix(key[:, None] + token * _GOLDEN)
    # Small values decide who wins, so they keep float32's relative precision down to 2**-54.
    uniform = (_shift_right(bits, 11).float() + 0.5) * 2.0**-53
    exponential = -torch.log1p(-uniform.clamp_(max=_LARGEST_BELOW_ONE))
    return -torch.log(exponential)


def sample_reference(logits: Tensor, batch: SamplingBatch) -> Tensor:
    if batch.all_greedy and batch.prompt_mask is None and batch.logit_bias is None and batch.grammar_mask is None:
        return logits.argmax(dim=-1)  # needs no field
    batch = batch.gathered()
    logits = masked(penalised(biased(logits.float(), batch), batch), batch.grammar_mask)
    best = logits.argmax(dim=-1)  # the first of equals
    if batch.all_greedy:
        return best
    greedy = batch.temperature <= 0
    scaled = logits / torch.where(greedy, 1.0, batch.temperature)[:, None]
    scaled = filtered(scaled, batch)
    drawn = (scaled + gumbel_noise(batch.seeds, batch.positions, logits.shape[1])).argmax(dim=-1)
    return torch.where(greedy, best, drawn)


def biased(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits with each row's bias added, before anything else sees them."""
    bias = batch.logit_bias
    if bias is None:
        return logits
    named = (bias.token_ids >= 0) & (batch.positions[:, None] < bias.before)
    return logits.scatter_add(1, bias.token_ids.clamp(min=0), torch.where(named, bias.values, 0.0))


def penalised(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits after the repetition penalty (prompt and output), then frequency and presence (output)."""
    if batch.prompt_mask is None or batch.output_counts is None:
        return logits
    generated = batch.output_counts > 0
    repeated = batch.prompt_mask | generated
    penalty = torch.where(repeated, batch.repetition_penalty[:, None], 1.0)
    logits = torch.where(logits > 0, logits / penalty, logits * penalty)
    logits = logits - batch.frequency_penalty[:, None] * batch.output_counts
    return logits - batch.presence_penalty[:, None] * generated


def masked(logits: Tensor, words: Tensor | None) -> Tensor:
    """Logits with -inf where a bit of the mask is clear."""
    if words is None:
        return logits
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device)
    return logits.masked_fill((bits & 1).flatten(1)[:, : logits.shape[1]] == 0, float("-inf"))


def filtered(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits with -inf where top-k, then top-p, then min-p leave a token out; the best token always stays."""
    if batch.any_top_k or batch.any_top_p:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        if batch.any_top_k:
            vocab_size = logits.shape[1]
            limit = torch.where(batch.top_k > 0, batch.top_k, vocab_size).clamp(max=vocab_size)
            kth = ordered.gather(1, limit.long()[:, None] - 1)
            ordered = ordered.masked_fill(ordered < kth, float("-inf"))  # equals of the k-th stay
        if batch.any_top_p:
            probability = ordered.softmax(dim=-1)
            # In float64 a GPU's free order of additions cannot move the cut, so all ranks make the same one.
            before = probability.cumsum(dim=-1, dtype=torch.float64) - probability
            outside = (before >= batch.top_p[:, None]) & (batch.top_p < 1)[:, None]
            outside[:, 0] = False
            ordered = ordered.masked_fill(outside, float("-inf"))
        logits = torch.empty_like(logits).scatter_(1, order, ordered)
    if batch.any_min_p:
        floor = logits.amax(dim=-1, keepdim=True) + torch.log(batch.min_p)[:, None]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return logits


def sample(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Choose one token per row: bias, penalties, grammar, temperature, top-k, top-p, min-p, then a Gumbel-max draw.

    The noise comes from (seed, output position, token index) through integer arithmetic, so a draw does not depend
    on the other rows, nor on how often or where a batch ran before.
    Shapes: logits float32 or bfloat16 [R, V] -> int64 [R]. Greedy rows take the lowest index among equals.
    Cost on a GPU: two launches, one read of the logits; a row with a filter writes its logits once and reads parts of
    them again.
    """
    if logits.device.type == "cuda":
        from vlmrt.kernels.triton.sampling import sample_triton

        return sample_triton(logits, batch)
    return sample_reference(logits, batch)


def logprobs_reference(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    values = logits.log_softmax(dim=-1)
    top_values, top_ids = values.topk(num_top, dim=-1)
    return values.gather(1, token_ids[:, None])[:, 0], top_ids, top_values


def logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each row's token and of its num_top likeliest, from the model's own logits.

    That is before bias, penalties and temperature. Which of equals are among the likeliest is not said.
    Shapes: logits float32 or bfloat16 [R, V], token_ids int64 [R] -> float32 [R], int64 and float32 [R, num_top].
    """
    if logits.device.type == "cuda":
        from vlmrt.kernels.triton.sampling import logprobs_triton

        return logprobs_triton(logits, token_ids, num_top)
    return logprobs_reference(logits.float(), token_ids, num_top)
