"""The exception tree, its wire form and its HTTP status.

Every error a client can see is a `RequestError`; it travels between processes as a `WireError` and leaves the edge as
`{"error": {"message", "type", "param", "code"}}`.  Every error that ends a start is a `StartupError`: one line for a
person.
"""

from __future__ import annotations

import msgspec


class VlmrtError(Exception):
    """Base of every error raised on purpose by vlmrt."""


class StartupError(VlmrtError):
    """The server cannot start; the message is one line that names the flag or file and what to change."""


class ChannelFull(VlmrtError):
    """A bounded channel to a peer is full: the peer is stuck or gone, and its supervisor will notice."""


class WireError(msgspec.Struct, frozen=True):
    """A `RequestError` between processes."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None


class RequestError(VlmrtError):
    """One request failed; the others go on.

    Args: `message` names field, value and bound; `status` is the HTTP status; `code` is a short machine-readable word;
    `param` is the path of the field at fault; `retry_after_s` is set where trying again can help (429, 503).
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    def to_wire(self) -> WireError:
        return WireError(self.status, self.message, self.code, self.param, self.retry_after_s)

    @classmethod
    def from_wire(cls, wire: WireError) -> RequestError:
        return cls(wire.message, status=wire.status, code=wire.code, param=wire.param, retry_after_s=wire.retry_after_s)


_DEVICE_ERRORS = ("AcceleratorError", "CudaError")  # torch's and cuda_ipc's; by name, so that torch is not imported
_DEVICE_MESSAGES = ("CUDA error:", "CUDA driver error:", "Triton Error [CUDA]:")


def is_device_fault(error: BaseException | None) -> bool:
    """Whether an error of the CUDA driver is the error, in the group, or what it came from; out of memory is none."""
    if error is None:
        return False
    if isinstance(error, BaseExceptionGroup) and any(map(is_device_fault, error.exceptions)):
        return True
    text = str(error)
    named = any(kind.__name__ in _DEVICE_ERRORS for kind in type(error).__mro__)
    said = isinstance(error, RuntimeError) and any(message in text for message in _DEVICE_MESSAGES)
    return ((named or said) and "out of memory" not in text) or is_device_fault(error.__cause__ or error.__context__)


def error_type(status: int) -> str:
    """The OpenAI `type` of an error body for an HTTP status."""
    match status:
        case 401 | 403:
            return "authentication_error"
        case 404:
            return "not_found_error"
        case 429:
            return "rate_limit_error"
        case _ if status >= 500:
            return "server_error"
        case _:
            return "invalid_request_error"
