"""Chat completions as OpenAI writes them, whole and in chunks."""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec import UNSET

from vlmrt.actors.edge.chat_request import ChatRequest
from vlmrt.actors.edge.choice import Piece
from vlmrt.actors.edge.chunks import ChunkWriter, usage_style
from vlmrt.actors.edge.detokenizer import Vocabulary
from vlmrt.actors.edge.generation import Answer
from vlmrt.actors.edge.responses import (
    AnswerMessage,
    CalledFunction,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    encode_json,
)
from vlmrt.actors.edge.served_model import ServedModel
from vlmrt.actors.edge.stream import failed_stream
from vlmrt.actors.edge.token_trace import ShownToken
from vlmrt.runtime.errors import RequestError

LEAST_LOGPROB = -9999.0  # JSON has no infinity
_GOES_ON = b'"finish_reason":null'


class ChatFormat:
    """Writes the answer to one chat completion request."""

    def __init__(
        self,
        answer_id: str,
        chat: ChatRequest,
        prompt_token_ids: tuple[int, ...],
        model: ServedModel,
        vocabulary: Vocabulary,
    ) -> None:
        self._answer_id = answer_id
        self._created = int(time.time())
        self._model = model
        self._vocabulary = vocabulary
        self._has_logprobs = bool(chat.logprobs)
        self._prompt_token_ids = prompt_token_ids if chat.return_token_ids else None
        constant: dict[str, str | int] = {
            "id": answer_id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": model.names[0],
            "system_fingerprint": model.fingerprint,
        }
        self._writer = ChunkWriter(constant, usage_style(chat))

    def whole(self, answer: Answer, choices: Sequence[Piece]) -> bytes:
        completion = ChatCompletion(
            id=self._answer_id,
            created=self._created,
            model=self._model.names[0],
            system_fingerprint=self._model.fingerprint,
            choices=tuple(map(self._choice, choices)),
            usage=answer.usage,
            prompt_token_ids=self._prompt_token_ids if self._prompt_token_ids is not None else UNSET,
        )
        return encode_json(completion)

    def _choice(self, piece: Piece) -> Choice:
        assert piece.finish_reason is not None
        return Choice(
            index=piece.index,
            message=_message(piece),
            logprobs=self._logprobs(piece.tokens) if self._has_logprobs else None,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=piece.token_ids if self._prompt_token_ids is not None else UNSET,
        )

    def begin(self, answer: Answer) -> bytes:
        """The role of every choice, in their order."""
        extra = b""
        if self._prompt_token_ids is not None:
            extra = b',"prompt_token_ids":' + encode_json(self._prompt_token_ids)
        role = b'{"role":"assistant","content":""}'
        return b"".join(self._chunk(answer, index, role, extra=extra) for index in range(answer.num_choices))

    def news(self, answer: Answer, pieces: Sequence[Piece]) -> bytes:
        return b"".join(self._piece(answer, piece) for piece in pieces)

    def _piece(self, answer: Answer, piece: Piece) -> bytes:
        """A chunk for every delta and one for the end; tokens go with the first of them."""
        deltas = list(map(encode_json, piece.deltas))
        if piece.finish_reason is not None:
            deltas.append(b"{}")
        logprobs = encode_json(self._logprobs(piece.tokens)) if piece.tokens else b"null"
        token_ids = b',"token_ids":' + encode_json(piece.token_ids) if self._prompt_token_ids is not None else b""
        data = b""
        for number, delta in enumerate(deltas):
            ends = piece.finish_reason is not None and number == len(deltas) - 1
            data += self._chunk(answer, piece.index, delta, logprobs, _finish(piece) if ends else _GOES_ON, token_ids)
            logprobs, token_ids = b"null", b""
        return data

    def _chunk(
        self,
        answer: Answer,
        index: int,
        delta: bytes,
        logprobs: bytes = b"null",
        finish: bytes = _GOES_ON,
        token_ids: bytes = b"",
        extra: bytes = b"",
    ) -> bytes:
        choice = b'{"index":%d,"delta":%b,"logprobs":%b,%b%b}' % (index, delta, logprobs, finish, token_ids)
        return self._writer.chunk(answer, choice, extra)

    def end(self, answer: Answer) -> bytes:
        return self._writer.end(answer)

    def failed(self, error: RequestError) -> bytes:
        return failed_stream(error)

    def _logprobs(self, tokens: Sequence[ShownToken]) -> ChoiceLogprobs:
        return ChoiceLogprobs(tuple(map(self._token, tokens)))

    def _token(self, token: ShownToken) -> TokenLogprob:
        text = self._vocabulary.token_text
        top = tuple(
            TopLogprob(text(token_id), max(logprob, LEAST_LOGPROB), tuple(self._vocabulary.all_token_bytes(token_id)))
            for token_id, logprob in token.logprobs.top
        )
        logprob = max(token.logprobs.logprob, LEAST_LOGPROB)
        return TokenLogprob(text(token.token_id), logprob, tuple(token.text_bytes), top)


def _message(piece: Piece) -> AnswerMessage:
    calls = tuple(ToolCall(call.id, CalledFunction(call.name, call.arguments)) for call in piece.tool_calls)
    if not calls:
        return AnswerMessage(piece.content)
    return AnswerMessage(piece.content or None, tool_calls=calls)


def _finish(piece: Piece) -> bytes:
    return b'"finish_reason":%b,"stop_reason":%b' % (encode_json(piece.finish_reason), encode_json(piece.stop_reason))
