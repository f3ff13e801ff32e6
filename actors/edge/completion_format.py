"""Text completions as OpenAI writes them, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec import UNSET

from vlmrt.actors.edge.chat_format import LEAST_LOGPROB
from vlmrt.actors.edge.choice import Piece
from vlmrt.actors.edge.chunks import ChunkWriter, usage_style
from vlmrt.actors.edge.completion_request import CompletionRequest
from vlmrt.actors.edge.detokenizer import Vocabulary
from vlmrt.actors.edge.generation import Answer
from vlmrt.actors.edge.responses import LegacyLogprobs, TextChoice, TextCompletion, encode_json
from vlmrt.actors.edge.served_model import ServedModel
from vlmrt.actors.edge.stream import failed_stream
from vlmrt.actors.edge.token_trace import ShownToken
from vlmrt.runtime.errors import RequestError


class CompletionFormat:
    """Writes the answer to one text completion request.

    Args: prompts: the token ids of each; echoes: their texts, where they are to be repeated before the answers.
    """

    def __init__(
        self,
        answer_id: str,
        fields: CompletionRequest,
        prompts: Sequence[tuple[int, ...]],
        echoes: Sequence[str] | None,
        model: ServedModel,
        vocabulary: Vocabulary,
    ) -> None:
        self._answer_id = answer_id
        self._created = int(time.time())
        self._model = model
        self._vocabulary = vocabulary
        self._has_logprobs = fields.logprobs is not None
        self._num_choices = fields.n or 1  # of one prompt
        self._prompts = prompts if fields.return_token_ids else None
        self._echoes = echoes
        constant: dict[str, str | int] = {
            "id": answer_id,
            "object": "text_completion",
            "created": self._created,
            "model": model.names[0],
            "system_fingerprint": model.fingerprint,
        }
        self._writer = ChunkWriter(constant, usage_style(fields))

    def whole(self, answer: Answer, choices: Sequence[Piece]) -> bytes:
        completion = TextCompletion(
            id=self._answer_id,
            created=self._created,
            model=self._model.names[0],
            system_fingerprint=self._model.fingerprint,
            choices=tuple(map(self._choice, choices)),
            usage=answer.usage,
        )
        return encode_json(completion)

    def _choice(self, piece: Piece) -> TextChoice:
        prompt = piece.index // self._num_choices
        return TextChoice(
            index=piece.index,
            text=(self._echoes[prompt] if self._echoes is not None else "") + piece.content,
            logprobs=self._logprobs(piece.tokens) if self._has_logprobs else None,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids if self._prompts is not None else UNSET,
            prompt_token_ids=self._prompts[prompt] if self._prompts is not None else UNSET,
        )

    def begin(self, answer: Answer) -> bytes:
        """What is repeated of the prompts; nothing else comes before the first text."""
        if self._echoes is None and self._prompts is None:
            return b""
        data = b""
        for index in range(answer.num_choices):
            prompt = index // self._num_choices
            choice = TextChoice(
                index=index,
                text=self._echoes[prompt] if self._echoes is not None else "",
                prompt_token_ids=self._prompts[prompt] if self._prompts is not None else UNSET,
            )
            data += self._writer.chunk(answer, encode_json(choice))
        return data

    def news(self, answer: Answer, pieces: Sequence[Piece]) -> bytes:
        data = b""
        for piece in pieces:
            choice = TextChoice(
                index=piece.index,
                text=piece.content,
                logprobs=self._logprobs(piece.tokens) if piece.tokens else None,
                finish_reason=piece.finish_reason,
                stop_reason=piece.stop_reason,
                token_ids=piece.token_ids if self._prompts is not None else UNSET,
            )
            data += self._writer.chunk(answer, encode_json(choice))
        return data

    def end(self, answer: Answer) -> bytes:
        return self._writer.end(answer)

    def failed(self, error: RequestError) -> bytes:
        return failed_stream(error)

    def _logprobs(self, tokens: Sequence[ShownToken]) -> LegacyLogprobs:
        text = self._vocabulary.token_text
        likeliest = []
        for token in tokens:
            entries = {text(token_id): max(logprob, LEAST_LOGPROB) for token_id, logprob in token.logprobs.top}
            entries.setdefault(text(token.token_id), max(token.logprobs.logprob, LEAST_LOGPROB))
            likeliest.append(entries)
        return LegacyLogprobs(
            tokens=tuple(text(token.token_id) for token in tokens),
            token_logprobs=tuple(max(token.logprobs.logprob, LEAST_LOGPROB) for token in tokens),
            top_logprobs=tuple(likeliest),
            text_offset=tuple(token.offset for token in tokens),
        )
