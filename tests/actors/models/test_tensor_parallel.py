"""Two ranks against one: shard arithmetic, and two real processes over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.actors.models.paged import PagedRunner, Request
from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.config import CheckpointError
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.actors.models.registry import family, load_model_config
from vlmrt.tools.checkpoint import make_checkpoint
from vlmrt.tools.checkpoint.make import random_tensor, tensor_shapes, write_weights

ROOT = Path(__file__).parents[3]
NUM_TOKENS = 24


def load(directory: Path, tp: TensorParallel) -> LanguageModel:
    config = load_model_config(directory)
    files = check_weight_files(directory)
    return family(config.model_type).load_language(files, config, tp, torch.device("cpu"), torch.float32)


def run(model: LanguageModel, tp_size: int) -> tuple[torch.Tensor, list[int]]:
    """Logits of every step, and the greedy tokens, of one prompt."""
    runner = PagedRunner(model, tp_size=tp_size)
    request = Request([(7 * index) % 900 for index in range(19)])
    logits = [runner.prefill(request, 8)]
    for _ in range(NUM_TOKENS - 1):
        request.token_ids.append(int(logits[-1].argmax()))
        logits.append(runner.step([(request, 1)]))
    return torch.cat(logits), request.token_ids[19:]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied checkpoint whose vocabulary two ranks cannot share evenly."""
    out = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "test-qwen2-vl", tie=False, weights=False)
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 1027}))
    shapes = tensor_shapes(load_model_config(out))
    write_weights(out, shapes, "float32", lambda name, shape: random_tensor(name, shape, "float32", 0, 0.12, "cpu"))
    return out


def test_shards_of_two_ranks_make_up_the_whole(directory: Path) -> None:
    whole = dict(load(directory, TensorParallel()).targets())
    ranks = [dict(load(directory, TensorParallel(rank, 2)).targets()) for rank in (0, 1)]
    for name, target in whole.items():
        first, second = (rank[name] for rank in ranks)
        assert first.shape == target.shape
        if first.dim is None:
            assert torch.equal(first.into, target.into)
        else:
            joined = torch.cat((first.into, second.into), dim=first.dim)
            assert torch.equal(joined.narrow(first.dim, 0, target.shape[first.dim]), target.into), name


def test_ranks_that_do_not_divide_the_heads_are_refused_at_load(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="num_attention_heads: 4 is not divisible by tensor parallel size 3"):
        load(directory, TensorParallel(0, 3))


@torch.inference_mode()
def test_two_processes_choose_the_tokens_of_one(directory: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from tests.actors.models.test_tensor_parallel import rank_main; "
        "rank_main(int(sys.argv[1]), sys.argv[2], sys.argv[3])"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(rank), str(directory), str(tmp_path)], cwd=ROOT)
        for rank in (0, 1)
    ]
    try:
        assert [process.wait(timeout=60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    expected_logits, expected_tokens = run(load(directory, TensorParallel()), 1)
    for rank in (0, 1):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["tokens"] == expected_tokens
        assert (torch.tensor(result["logits"]) - expected_logits).abs().max() <= 1e-4


def rank_main(rank: int, directory: str, out: str) -> None:
    """One rank of the test above, in its own process."""
    import os

    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{out}/rendezvous", 2)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with torch.inference_mode():
        logits, tokens = run(load(Path(directory), TensorParallel(rank, 2, dist.group.WORLD)), 2)
    Path(f"{out}/{rank}.json").write_text(json.dumps({"tokens": tokens, "logits": logits.tolist()}))
    dist.destroy_process_group()
