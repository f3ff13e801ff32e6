"""vlmrt: an inference server for vision-language models, and the same models offline: `from vlmrt import LLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmrt.runtime.errors import RequestError, StartupError, VlmrtError
    from vlmrt.tools.offline.errors import BatchError, EngineDeadError
    from vlmrt.tools.offline.llm import LLM
    from vlmrt.tools.offline.outputs import CompletionOutput, RequestOutput, TokenLogprob
    from vlmrt.tools.offline.sampling_params import SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"

_OFFLINE = "vlmrt.tools.offline"
_HOMES = {
    "LLM": f"{_OFFLINE}.llm",
    "SamplingParams": f"{_OFFLINE}.sampling_params",
    "StructuredOutputsParams": f"{_OFFLINE}.sampling_params",
    "RequestOutput": f"{_OFFLINE}.outputs",
    "CompletionOutput": f"{_OFFLINE}.outputs",
    "TokenLogprob": f"{_OFFLINE}.outputs",
    "BatchError": f"{_OFFLINE}.errors",
    "EngineDeadError": f"{_OFFLINE}.errors",
    "RequestError": "vlmrt.runtime.errors",
    "StartupError": "vlmrt.runtime.errors",
    "VlmrtError": "vlmrt.runtime.errors",
}

__all__ = [
    "LLM",
    "BatchError",
    "CompletionOutput",
    "EngineDeadError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StartupError",
    "StructuredOutputsParams",
    "TokenLogprob",
    "VlmrtError",
]


def __getattr__(name: str) -> Any:
    """Imported when first touched: every actor imports this package, and needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
