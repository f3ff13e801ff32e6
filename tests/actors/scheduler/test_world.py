"""Random lives of a whole service: every request ends once, with the tokens it would have got alone."""

from __future__ import annotations

import pytest

from tests.actors.scheduler.world import Sizes, run_world


@pytest.mark.parametrize("seed", range(20))
def test_every_request_ends_once_with_the_tokens_it_would_have_got_alone(seed: int) -> None:
    run_world(Sizes(), seed, 60)
