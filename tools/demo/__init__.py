"""The demo model: a toy Qwen2-VL, trained here on drawn pictures, that ships with the package and answers honestly."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
