"""Log-probabilities are the reference's; biases force, ban, and end."""

from __future__ import annotations

import pytest
import torch

from tests.actors.llm.conftest import Checkpoint
from tests.actors.llm.driver import Driver, Request, make_runner
from tests.actors.llm.test_out_of_memory import Cramped
from tests.actors.llm.test_sampler import Bench
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.runtime.messages import LogitBias, Sampling

NEVER = float("-inf")


def make_driver(checkpoint: Checkpoint, model: Cramped | None = None) -> Driver:
    return Driver(make_runner(model or checkpoint.model, checkpoint.config, TensorParallel()))  # type: ignore[arg-type]


def check_logprobs(checkpoint: Checkpoint, request: Request, tolerance: float = 1e-4) -> None:
    """Those of the tokens it has, against the softmax of the reference's logits in float64."""
    count = request.sampling.num_logprobs
    if count < 0:
        assert request.logprobs == []
        return
    assert len(request.logprobs) == len(request.output_ids)
    with torch.inference_mode():
        logits = checkpoint.reference.model(input_ids=torch.tensor([request.token_ids])).logits[0]
    exact = logits.double().log_softmax(-1)[request.num_prompt_tokens - 1 :]
    for row, token_id, found in zip(exact, request.output_ids, request.logprobs, strict=False):
        assert found.logprob == pytest.approx(float(row[token_id]), abs=tolerance)
        assert len({token for token, _ in found.top}) == len(found.top) == count
        values = [value for _, value in found.top]
        assert values == pytest.approx(row.topk(count).values.tolist(), abs=tolerance)
        assert [float(row[token]) for token, _ in found.top] == pytest.approx(values, abs=tolerance)


ASKED = (
    Sampling(temperature=0.0, num_logprobs=5),
    Sampling(temperature=0.0),
    Sampling(temperature=1.3, seed=4, num_logprobs=0),
    Sampling(temperature=0.7, seed=5, top_k=9, num_logprobs=20, presence_penalty=1.5),
    Sampling(temperature=0.0, num_logprobs=2, logit_bias=(LogitBias(11, 100.0), LogitBias(12, NEVER))),
)


def test_logprobs_are_those_of_the_model_in_prefill_decode_and_mixed_steps(one_checkpoint: Checkpoint) -> None:
    driver = make_driver(one_checkpoint)
    running: list[Request] = []
    for seed, sampling in enumerate(ASKED):
        request, _ = one_checkpoint.prompt(seed, 11 + seed, sampling=sampling)
        driver.admit(request)
        while request.num_computed < request.num_prompt_tokens:
            chunk = min(6, request.num_prompt_tokens - request.num_computed)
            driver.run([(other, 1) for other in running] + [(request, chunk)])
        running.append(request)
    driver.decode(running, 4)
    driver.decode([running[1]], 1)
    assert not driver.run([(running[1], 1)]).logprobs  # nobody asked
    for request in running:
        check_logprobs(one_checkpoint, request)
    assert set(running[4].output_ids) == {11}


def test_a_step_in_pieces_finds_each_row_its_own_logprobs(one_checkpoint: Checkpoint) -> None:
    model = Cramped(one_checkpoint.model)
    driver = make_driver(one_checkpoint, model)
    requests = [one_checkpoint.prompt(20 + i, 8, sampling=sampling)[0] for i, sampling in enumerate(ASKED)]
    for request in requests:
        driver.admit(request)
        driver.prefill(request)
    model.max_logits = 1
    driver.decode(requests, 3)
    assert model.num_refused
    for request in requests:
        check_logprobs(one_checkpoint, request)


def test_a_bias_forces_or_bans_its_token_for_as_long_as_it_holds() -> None:
    bench = Bench()
    logits = torch.zeros(4, 23)
    logits[:, 7] = 3.0
    logits[:, 8] = 2.0
    asked = (
        (LogitBias(3, 100.0),),
        (LogitBias(7, NEVER, before=2),),
        (LogitBias(7, -100.0), LogitBias(8, 1.0), LogitBias(8, -2.5)),
        (),
    )
    for slot, biases in enumerate(asked):
        bench.admit(slot, [1], 1, Sampling(temperature=0.0, logit_bias=biases))
    drawn = [bench.sample([0, 1, 2, 3], logits) for _ in range(3)]
    assert drawn == [[3, 8, 8, 7], [3, 8, 8, 7], [3, 7, 8, 7]]
    # one that comes back with its two tokens continues where it was; the next one in its slot has none of its biases
    bench.admit(0, [1, 8], 1, Sampling(temperature=0.0, logit_bias=asked[1]))
    bench.admit(1, [1], 1, Sampling(temperature=0.0))
    assert [bench.sample([0, 1], logits[:2]) for _ in range(2)] == [[8, 7], [7, 7]]


def test_the_table_of_biases_grows_with_the_longest_and_keeps_the_others() -> None:
    bench = Bench()
    logits = torch.arange(23.0).flip(0)[None].expand(3, -1)  # the best is 0, then 1, ...
    bench.admit(0, [1], 1, Sampling(temperature=0.0, logit_bias=(LogitBias(0, NEVER),)))
    assert bench.sample([0], logits[:1]) == [1]
    many = tuple(LogitBias(token_id % 21, -50.0) for token_id in range(40))
    bench.admit(1, [1], 1, Sampling(temperature=0.0, logit_bias=many))
    bench.admit(2, [1], 1, Sampling(temperature=0.0))
    assert bench.sample([0, 1, 2], logits) == [1, 21, 0]
    outside = (LogitBias(-1, 9.0), LogitBias(23, 9.0), LogitBias(10**9, 9.0), LogitBias(2, 30.0))
    bench.admit(1, [1], 1, Sampling(temperature=0.0, logit_bias=outside))
    assert bench.sample([0, 1, 2], logits) == [1, 2, 0]


def test_a_bias_alone_makes_no_other_draw(one_checkpoint: Checkpoint) -> None:
    """Banned until the last token, its end token ends nothing early; beside it others draw as they do alone."""

    def run(*asked: Sampling) -> list[list[int]]:
        driver = make_driver(one_checkpoint)
        requests = [one_checkpoint.prompt(60 + i, 8, sampling=sampling)[0] for i, sampling in enumerate(asked)]
        for request in requests:
            driver.admit(request)
            driver.prefill(request)
        driver.decode(requests, 5)
        return [request.output_ids for request in requests]

    plain = Sampling(temperature=1.0, seed=8, top_p=0.9)
    (alone,) = run(plain)
    unmoved = Sampling(temperature=1.0, seed=8, top_p=0.9, logit_bias=(LogitBias(5, 0.0),))
    assert run(unmoved) == [alone]
    biased = Sampling(temperature=1.0, seed=9, logit_bias=tuple(LogitBias(token_id, NEVER) for token_id in range(300)))
    beside, drawn = run(plain, biased)
    assert beside == alone
    assert min(drawn) >= 300
