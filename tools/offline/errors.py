"""What can go wrong beside a wrong argument and a failed start (runtime.errors.StartupError)."""

from __future__ import annotations

from collections.abc import Sequence

from vlmrt.runtime.errors import RequestError, VlmrtError
from vlmrt.tools.offline.outputs import RequestOutput


class EngineDeadError(VlmrtError):
    """The processes behind an LLM are gone, or the LLM was closed: it answers nothing any more."""


class BatchError(VlmrtError):
    """Some requests of a batch failed; the others were answered.

    `outputs` has one entry per request, in input order: its RequestOutput or its RequestError.
    """

    def __init__(self, outputs: Sequence[RequestOutput | RequestError]) -> None:
        self.outputs = list(outputs)
        self.failures = {index: output for index, output in enumerate(outputs) if isinstance(output, RequestError)}
        first, error = next(iter(self.failures.items()))
        others = f" (and {len(self.failures) - 1} more)" if len(self.failures) > 1 else ""
        super().__init__(f"request {first} of {len(self.outputs)} failed{others}: {error}")
