"""API keys of a real server: who is let in, what tenants share, and where a key can be seen."""

from __future__ import annotations

import os
from pathlib import Path

import openai
import pytest

from tests.system.server import descendants, launch

SECRETS = ("sk-of-the-environment", "sk-of-team-a", "sk-of-team-b")
QUESTION = "Which colors, shapes and digits can you name, and how many of each? " * 4


def test_tenants_share_no_prefix_and_no_child_has_a_key(
    tmp_path: Path, run_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{SECRETS[1]} a\n{SECRETS[2]} b # the other team\n")
    monkeypatch.setenv("VLMRT_API_KEY", SECRETS[0])
    with launch("--api-key-file", str(keys), run_root=run_root) as server:
        with pytest.raises(openai.AuthenticationError):
            server.client.models.list()
        assert server.healthy()

        def num_cached(key: str) -> int:
            completions = server.client.with_options(api_key=key).chat.completions
            asked = [{"role": "user", "content": QUESTION}]
            done = completions.create(model="model", messages=asked, max_tokens=2)  # type: ignore[arg-type]
            assert done.usage is not None
            assert done.usage.prompt_tokens_details is not None
            return done.usage.prompt_tokens_details.cached_tokens or 0

        assert [num_cached(key) for key in SECRETS] == [0, 0, 0]
        assert all(num_cached(key) > 0 for key in SECRETS)
        children = descendants(server.process.pid)
        assert len(children) >= 5
        for process in children:
            seen = "\0".join((*process.cmdline(), *(f"{name}={value}" for name, value in process.environ().items())))
            assert not any(secret in seen for secret in SECRETS), process
        output = "".join(server.output)
    assert "API key    on (3 keys, 2 tenants)" in output
    assert not any(secret in "".join(server.output) for secret in SECRETS)
    assert os.environ["VLMRT_API_KEY"] == SECRETS[0]  # of this process, which only passed it on
