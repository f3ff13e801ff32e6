"""Random-weight checkpoints in the public layout, for tests and benchmarks."""

from vlmrt.tools.checkpoint.make import make_checkpoint
from vlmrt.tools.checkpoint.presets import PRESETS

__all__ = ["PRESETS", "make_checkpoint"]
