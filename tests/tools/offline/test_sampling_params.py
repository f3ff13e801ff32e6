"""Sampling parameters are checked when they are made, and say in a request what they were given."""

from __future__ import annotations

from typing import Any

import pytest

from vlmrt.tools.offline.sampling_params import SamplingParams, StructuredOutputsParams

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n = 0 is not within 1..128"),
    ({"n": 129}, "n = 129"),
    ({"temperature": -0.1}, "temperature = -0.1 is not within 0..2"),
    ({"temperature": float("nan")}, "temperature = nan"),
    ({"top_p": 0}, r"top_p = 0 is not within \(0, 1\]"),
    ({"top_k": -2}, "top_k = -2 is not within -1.."),
    ({"min_p": 1.1}, "min_p = 1.1"),
    ({"presence_penalty": 2.5}, "presence_penalty = 2.5 is not within -2..2"),
    ({"frequency_penalty": -3}, "frequency_penalty = -3"),
    ({"repetition_penalty": 0}, "repetition_penalty = 0"),
    ({"seed": 2**63}, f"seed = {2**63}"),
    ({"stop": ""}, "stop holds an empty string"),
    ({"stop": ["a"] * 17}, "stop has 17 strings, more than 16"),
    ({"stop_token_ids": [1, -1]}, "stop_token_ids = -1"),
    ({"max_tokens": 0}, "max_tokens = 0"),
    ({"min_tokens": -1}, "min_tokens = -1"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens = 5 is above max_tokens = 4"),
    ({"logprobs": 21}, "logprobs = 21 is not within 0..20"),
    ({"logit_bias": {3: 101}}, r"logit_bias\[3\] = 101 is not within -100..100"),
    ({"logit_bias": {-3: 1}}, "logit_bias = -3"),
]

WRONG_TYPES: list[tuple[dict[str, Any], str]] = [
    ({"n": 1.0}, "n = 1.0: an integer is expected"),
    ({"n": True}, "n = True: an integer"),
    ({"temperature": "hot"}, "temperature = 'hot': a number"),
    ({"stop": [3]}, "stop = 3: a string"),
    ({"ignore_eos": 1}, "ignore_eos = 1: True or False"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs = .* a StructuredOutputsParams"),
    ({"temprature": 1}, "temprature"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_a_value_out_of_bounds_is_named_with_its_bound(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


@pytest.mark.parametrize(("fields", "message"), WRONG_TYPES, ids=lambda value: str(value)[:40])
def test_a_value_of_a_wrong_type_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        SamplingParams(**fields)


def test_what_is_not_given_is_not_said() -> None:
    assert SamplingParams().fields(chat=True) == {}
    assert SamplingParams().fields(chat=False) == {"max_tokens": 2**31 - 1}


def test_every_field_is_said_under_the_name_of_the_api() -> None:
    params = SamplingParams(
        n=2,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.5,
        seed=-4,
        stop="end",
        stop_token_ids=[7],
        max_tokens=9,
        min_tokens=2,
        logprobs=3,
        ignore_eos=True,
        skip_special_tokens=False,
        logit_bias={5: -100},
        structured_outputs=StructuredOutputsParams(choice=["yes", "no"]),
    )
    common = {
        "n": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "seed": -4,
        "stop": ["end"],
        "stop_token_ids": [7],
        "max_tokens": 9,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "logit_bias": {"5": -100},
        "structured_outputs": {"choice": ["yes", "no"]},
    }
    assert params.fields(chat=True) == {**common, "logprobs": True, "top_logprobs": 3}
    assert params.fields(chat=False) == {**common, "logprobs": 3}


@pytest.mark.parametrize("fields", [{}, {"regex": "a", "json_object": True}, {"json_object": False}])
def test_a_structure_is_given_exactly_once(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        StructuredOutputsParams(**fields)


def test_parameters_cannot_be_changed() -> None:
    params = SamplingParams()
    with pytest.raises(AttributeError):
        params.n = 2  # type: ignore[misc]
