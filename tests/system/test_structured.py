"""Through the whole service, a model without training writes valid JSON: by schemas, formats and tools."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from tests.actors.edge.schemas import random_schema
from tests.pictures import picture
from tests.system.server import Server, launch
from vlmrt.tools.checkpoint import make_checkpoint

NUM_SCHEMAS = 12  # of `make test`; the soak has 100
CONCURRENCY = 6
ENDS = ('"', "}", "]", ",", '"}', '":')  # made likelier, so that strings and lists of such a model come to an end


class Asker:
    """Sends one request and checks what comes of it; returns its finish_reason."""

    def __init__(self, server: Server, checkpoint: Path) -> None:
        self._server = server
        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        ids = [tokenizer.token_to_id(end) for end in ENDS]
        self._bias = {str(token_id): 4 for token_id in ids if token_id is not None}

    def schema(self, seed: int) -> str:
        rng = random.Random(seed)
        schema = random_schema(rng)
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": bool(seed % 2)}}
        choice = self._ask(rng, response_format=form)
        if choice.finish_reason == "stop":
            jsonschema.Draft202012Validator(schema).validate(json.loads(choice.message.content))
        return str(choice.finish_reason)

    def tools(self, seed: int) -> str:
        rng = random.Random(seed)
        schemas = {f"f{index}": random_schema(rng) for index in range(rng.randint(1, 3))}
        tools = [{"type": "function", "function": {"name": n, "parameters": schema}} for n, schema in schemas.items()]
        named = {"type": "function", "function": {"name": "f0"}}
        parallel = seed % 3 == 0
        choice = self._ask(
            rng, tools=tools, tool_choice=named if seed % 2 else "required", parallel_tool_calls=parallel
        )
        if choice.finish_reason != "length":
            assert choice.finish_reason == ("stop" if seed % 2 else "tool_calls")
            assert choice.message.content is None
            assert len(choice.message.tool_calls) == 1 or parallel
            for call in choice.message.tool_calls:
                schema = schemas[call.function.name]
                jsonschema.Draft202012Validator(schema).validate(json.loads(call.function.arguments))
        return "length" if choice.finish_reason == "length" else "stop"

    def other(self, seed: int) -> str:
        rng = random.Random(seed)
        match seed % 3:
            case 0:
                choice = self._ask(rng, response_format={"type": "json_object"})
                if choice.finish_reason == "stop":
                    assert isinstance(json.loads(choice.message.content), dict)
            case 1:
                choice = self._ask(rng, structured_outputs={"regex": r"[A-Z]{2}-\d{2,6}"})
                assert re.fullmatch(r"[A-Z]{2}-\d{2,6}", choice.message.content)
            case _:
                choice = self._ask(rng, structured_outputs={"choice": ["yes", "no", "größer 🙂"]})
                assert choice.message.content in ("yes", "no", "größer 🙂")
        return str(choice.finish_reason)

    def _ask(self, rng: random.Random, **fields: Any) -> Any:
        parts: list[dict[str, Any]] = [picture(rng.choice((0, 1, 5, 7))).part] if rng.random() < 0.3 else []
        answer = self._server.chat(
            [*parts, {"type": "text", "text": "Answer me in JSON."}],
            max_tokens=400,
            temperature=rng.choice((0.7, 1.0)),
            seed=rng.randrange(1000),
            logit_bias=self._bias,
            extra_body=fields,
        )
        return answer.choices[0]


def check_with_tiny_model(directory: Path, run_root: Path, num_schemas: int) -> None:
    checkpoint = make_checkpoint(directory / "model", "test-qwen2-vl", dtype="float32")
    with launch("--model", str(checkpoint), run_root=run_root) as server, ThreadPoolExecutor(CONCURRENCY) as pool:
        ask = Asker(server, checkpoint)
        for kind, count in ((ask.schema, num_schemas), (ask.tools, num_schemas // 3), (ask.other, num_schemas // 3)):
            reasons = Counter(pool.map(kind, range(count)))
            print(f"{kind.__name__}: {dict(reasons)}")
            assert set(reasons) <= {"stop", "length"}
            assert reasons["stop"] > count / 4


def test_whatever_ends_is_valid(tmp_path: Path, run_root: Path) -> None:
    check_with_tiny_model(tmp_path, run_root, NUM_SCHEMAS)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_whatever_ends_is_valid_for_a_hundred_schemas(tmp_path: Path, run_root: Path) -> None:
    check_with_tiny_model(tmp_path, run_root, 100)
