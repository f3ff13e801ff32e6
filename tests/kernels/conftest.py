"""What the tests of kernels share."""

import pytest

INTERPRETED = (
    "test_gelu_linear.py",
    "test_linear.py",
    "test_paged_attention_triton.py",
    "test_sampling_triton.py",
    "test_triton_elementwise.py",
    "test_triton_vision_attention.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing is traced for coverage while kernels are interpreted, which would take nearly twice as long."""
    for item in items:
        if item.path.name in INTERPRETED:
            item.add_marker("no_cover")
