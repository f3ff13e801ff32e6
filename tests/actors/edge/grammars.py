"""Tokenizers and matchers that the tests of grammars share."""

from __future__ import annotations

import json
import random
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from vlmrt.actors.edge.tools import CALL_BEGIN, CALL_END

VOCAB_SIZE = 1100  # of the logits; wider than the tokenizers
LIKELY = tuple(b'"}],:0')  # what ends strings, objects and lists


def with_call_marks(tokenizer_json: str, special: bool) -> str:
    """The tokenizer with the marks of calls as tokens of their own, as Qwen2.5's has them."""
    tokenizer = json.loads(tokenizer_json)
    marks = {"<|object_ref_start|>": CALL_BEGIN, "<|object_ref_end|>": CALL_END}  # in place of two that nobody uses
    for token in tokenizer["added_tokens"]:
        if token["content"] in marks:
            token.update(content=marks[token["content"]], special=special)
    return json.dumps(tokenizer)


class Vocabulary:
    """One tokenizer, as the library of tokenizers and as the grammar compiler see it."""

    def __init__(self, tokenizer_json: str) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.eos_token_id = self.tokenizer.token_to_id("<|im_end|>")
        self.compiled = LLTokenizer(tokenizer_json, n_vocab=VOCAB_SIZE, eos_token=self.eos_token_id)

    def accepts(self, grammar: str, text: str) -> bool:
        """Whether the whole text, in the tokens that a model writes it in, matches."""
        matcher = LLMatcher(self.compiled, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        token_ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()

    def random_text(self, grammar: str, rng: random.Random, max_tokens: int = 400) -> str | None:
        """What a model without sense writes under the grammar; None where it came to no end."""
        matcher = LLMatcher(self.compiled, grammar, log_level=0)
        written: list[int] = []
        for _ in range(max_tokens):
            mask = matcher.compute_bitmask()
            assert not matcher.is_error(), matcher.get_error()
            allowed = [i for i in range(VOCAB_SIZE) if mask[i // 8] >> (i % 8) & 1]
            ends = [i for i in allowed if i == self.eos_token_id or self._ends(i)]
            token_id = rng.choice(ends if ends and rng.random() < 0.5 else allowed)
            if token_id == self.eos_token_id:
                return self.tokenizer.decode(written, skip_special_tokens=False)
            written.append(token_id)
            assert matcher.consume_token(token_id)
        return None

    def _ends(self, token_id: int) -> bool:
        text = (self.tokenizer.id_to_token(token_id) or "").encode()
        return len(text) == 1 and text[0] in LIKELY


def load_vocabulary(checkpoint: Path) -> Vocabulary:
    return Vocabulary((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
