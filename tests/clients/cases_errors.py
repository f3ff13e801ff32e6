"""Errors: the class that the client raises, and what it can say."""

from __future__ import annotations

from typing import Any

import openai

from tests.clients.api import Api, Skip, about_a_red_disc, raises
from tests.clients.cases import each

ROLE = {"role": "wizard", "content": "Hello"}


def _check_body(error: Any) -> None:
    """All four keys: the client shows them as attributes and, whole, as its body."""
    assert set(error.body) == {"message", "type", "param", "code"}
    assert len(error.body["message"]) > 10
    assert error.request_id == error.response.headers["x-request-id"]


@each(
    wrong=[
        ("temperature", {"temperature": 3}),
        ("temperature", {"temperature": "hot"}),
        ("top_p", {"top_p": 1.5}),
        ("max_tokens", {"max_tokens": 0}),
        ("n", {"n": 0}),
        ("n", {"n": 129}),
        ("seed", {"seed": 2**63}),
        ("stop", {"stop": [""]}),
        ("frequency_penalty", {"frequency_penalty": 3}),
        ("presence_penalty", {"presence_penalty": -3}),
        ("logit_bias", {"logit_bias": {"1": 101}}),
        ("logit_bias", {"logit_bias": {"99999999": 1}}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("messages", {"messages": []}),
        ("messages[0].role", {"messages": [ROLE]}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("modalities", {"modalities": ["text", "audio"]}),
    ]
)
def a_wrong_value_is_a_bad_request(api: Api, wrong: tuple[str, dict[str, Any]]) -> None:
    param, fields = wrong
    error = raises(openai.BadRequestError, lambda: api.chat(**fields))
    _check_body(error)
    assert error.status_code == 400
    assert error.type == "invalid_request_error"
    assert error.param.startswith(param)


def a_prompt_beyond_the_context_says_so(api: Api) -> None:
    error = raises(openai.BadRequestError, lambda: api.chat("red circle " * 20_000))
    _check_body(error)
    assert error.code == "context_length_exceeded"


def a_model_that_is_not_served_is_not_found(api: Api) -> None:
    error = raises(openai.NotFoundError, lambda: api.chat(model="gpt-nothing"))
    _check_body(error)
    assert (error.code, error.param) == ("model_not_found", "model")


def a_wrong_stream_raises_before_its_first_chunk(api: Api) -> None:
    error = raises(openai.BadRequestError, lambda: api.chat(stream=True, temperature=5))
    _check_body(error)


def embeddings_are_not_found(api: Api) -> None:
    error = raises(openai.NotFoundError, lambda: api.client.embeddings.create(model="model", input="Hello"))
    _check_body(error)


def a_route_that_is_none_is_not_found(api: Api) -> None:
    error = raises(openai.NotFoundError, lambda: api.client.get("/nowhere", cast_to=object))
    _check_body(error)


def a_method_that_is_none_is_a_status_error(api: Api) -> None:
    error = raises(openai.APIStatusError, lambda: api.client.delete("/models", cast_to=object))
    _check_body(error)
    assert error.status_code == 405


def a_body_too_large_is_a_status_error(api: Api) -> None:
    error = raises(openai.APIStatusError, lambda: api.chat("x" * (65 << 20)))
    _check_body(error)
    assert error.status_code == 413


def a_body_that_is_no_json_is_a_status_error(api: Api) -> None:
    options = {"headers": {"Content-Type": "text/plain"}}
    error = raises(
        openai.APIStatusError,
        lambda: api.client.post("/chat/completions", cast_to=object, body={}, options=options),
    )
    _check_body(error)
    assert error.status_code == 415


@each(key=["another", "nearly right"])
def a_wrong_key_is_an_authentication_error(api: Api, key: str) -> None:
    if api.api_key is None:
        raise Skip("the server has no key")
    with api.other_client(api_key=f"{api.api_key}x" if key == "nearly right" else key) as client:
        error = raises(openai.AuthenticationError, lambda: client.models.list())
    _check_body(error)
    assert error.code == "invalid_api_key"


def nobody_at_the_address_is_a_connection_error(api: Api) -> None:
    with api.other_client(base_url="http://127.0.0.1:9/v1") as client:
        raises(openai.APIConnectionError, lambda: client.models.list())


def after_every_error_the_server_still_sees(api: Api) -> None:
    assert api.chat(about_a_red_disc()).choices[0].message.content == "Red."
