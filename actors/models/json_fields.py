"""Checked reading of a checkpoint's JSON: a complaint names the file, the field, its value and the bound."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from vlmrt.actors.models.config import CheckpointError


class JsonFields:
    """One JSON object of a file, with the path of field names that leads to it."""

    def __init__(self, file: Path, values: dict[str, Any], prefix: str = "") -> None:
        self.file = file
        self.values = values
        self.prefix = prefix

    @classmethod
    def read(cls, file: Path) -> "JsonFields":
        """The object in a file. Raises CheckpointError if it is missing, not JSON or not an object."""
        try:
            values = msgspec.json.decode(file.read_bytes())
        except FileNotFoundError:
            raise CheckpointError(f"{file}: the file is missing") from None
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from None
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: holds {type(values).__name__}, expected a JSON object")
        return cls(file, values)

    def error(self, field: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: field {self.prefix}{field}: {problem}")

    def get(self, *names: str) -> tuple[str, Any]:
        """(name, value) of the first spelling present and not null, or (the first spelling, None)."""
        for name in names:
            if self.values.get(name) is not None:
                return name, self.values[name]
        return names[0], None

    def section(self, name: str) -> "JsonFields | None":
        """The object under a name; None where the file has none."""
        _, value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, f"{value!r} is not an object")
        return JsonFields(self.file, value, f"{self.prefix}{name}.")

    def integer(self, *names: str, minimum: int = 1, default: int | None = None) -> int:
        name, value = self.get(*names)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(name, f"{value!r} is not an integer of at least {minimum}")
        return value

    def number(
        self,
        *names: str,
        above: float | None = 0.0,
        minimum: float | None = None,
        maximum: float | None = None,
        default: float | None = None,
    ) -> float:
        """A finite number greater than above, or within the other bounds; None sets no bound."""
        name, value = self.get(*names)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(name, f"{value!r} is not a finite number")
        if minimum is not None:
            if value < minimum:
                raise self.error(name, f"{value!r} is below {minimum:g}")
        elif above is not None and not value > above:
            raise self.error(name, f"{value!r} is not above {above:g}")
        if maximum is not None and value > maximum:
            raise self.error(name, f"{value!r} is above {maximum:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        _, value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"{value!r} is not true or false")
        return value

    def choice(self, *names: str, allowed: Sequence[str], default: str | None = None) -> str:
        name, value = self.get(*names)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "is missing")
        if value not in allowed:
            raise self.error(name, f"{value!r} is not supported (supported: {', '.join(allowed)})")
        return str(value)

    def integers(
        self, name: str, *, length: int | None = None, default: tuple[int, ...] | None = None
    ) -> tuple[int, ...]:
        """A list of non-negative integers; a single integer counts as a list of one."""
        _, value = self.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        items = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in items):
            raise self.error(name, f"{value!r} is not a list of non-negative integers")
        if length is not None and len(items) != length:
            raise self.error(name, f"{value!r} has {len(items)} items, expected {length}")
        return tuple(items)

    def three_numbers(self, name: str) -> tuple[float, float, float]:
        _, value = self.get(name)
        numbers = value if isinstance(value, list) else []
        if len(numbers) != 3 or any(isinstance(item, bool) or not isinstance(item, int | float) for item in numbers):
            raise self.error(name, f"{value!r} is not a list of 3 numbers")
        return float(numbers[0]), float(numbers[1]), float(numbers[2])
