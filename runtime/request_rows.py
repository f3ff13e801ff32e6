"""What edges and the scheduler say of open requests -> one row for each HTTP request.  Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlmrt.runtime.admin_messages import OpenRequestRow, RequestsReply, RequestState
from vlmrt.runtime.questions import MAX_ROWS, AnswerRow, AnswersOpen, RequestRow, RequestsOpen


def merge_requests(edges: Mapping[str, AnswersOpen], scheduler: RequestsOpen | None) -> RequestsReply:
    """Args: `scheduler` is None where it did not say; then nothing is known of tokens."""
    at_scheduler = {} if scheduler is None else {row.request_id: row for row in scheduler.rows}
    rows = [_merged(edge, answer, at_scheduler) for edge, answers in edges.items() for answer in answers.rows]
    rows.sort(key=lambda row: row.age_s, reverse=True)
    return RequestsReply(tuple(rows[:MAX_ROWS]), sum(answers.num_open for answers in edges.values()))


def _merged(edge: str, answer: AnswerRow, at_scheduler: Mapping[str, RequestRow]) -> OpenRequestRow:
    requests = [at_scheduler[request_id] for request_id in answer.request_ids if request_id in at_scheduler]
    first = requests[0] if requests else None
    return OpenRequestRow(
        edge=edge,
        label=answer.label,
        answer_id=answer.answer_id,
        path=answer.path,
        age_s=answer.age_s,
        streams=answer.streams,
        state=_state(answer, requests),
        num_choices=len(answer.request_ids),
        num_prompt_tokens=first.num_prompt_tokens if first else 0,
        num_computed_tokens=sum(request.num_computed_tokens for request in requests),
        num_cached_tokens=first.num_cached_tokens if first else 0,
        num_output_tokens=sum(request.num_output_tokens for request in requests),
        max_tokens=sum(request.max_tokens for request in requests),
        num_images=first.num_images if first else 0,
        num_rows=first.num_rows if first else 0,
        num_wanted=first.num_wanted if first else 0,
    )


def _state(answer: AnswerRow, requests: Sequence[RequestRow]) -> RequestState:
    """That of the choice that is furthest."""
    if not answer.request_ids:
        return "preparing"
    if not requests:
        return "ending"  # the scheduler is done with it
    if any(request.num_output_tokens for request in requests):
        return "decode"
    if any(request.status == "running" for request in requests):
        return "prefill"
    return "media" if any(request.num_wanted for request in requests) else "waiting"
