"""A full-size language model on a GPU in bfloat16 is no further from float32 than transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

from tests.actors.models.paged import PagedRunner, Request
from vlmrt.actors.models.layers import TensorParallel
from vlmrt.actors.models.qwen2_vl.language import LanguageModel
from vlmrt.actors.models.registry import load_model_config
from vlmrt.tools.checkpoint import make_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GPU = torch.device("cuda:0")
STD = 0.02
NUM_PROMPT_TOKENS = 300
NUM_DECODES = 12


def random_model(directory: Path) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(load_model_config(directory).text, TensorParallel(), torch.bfloat16, GPU)
    for parameter in model.parameters():
        parameter.normal_(0.0, STD) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model


def reference_logits(directory: Path, model: LanguageModel, token_ids: list[int], dtype: torch.dtype) -> Tensor:
    """Of the last NUM_DECODES + 1 tokens, by transformers' model with the weights of ours."""
    config = transformers.AutoConfig.from_pretrained(directory).text_config
    with torch.device(GPU):
        reference = Qwen2VLTextModel._from_config(config, attn_implementation="sdpa").to(dtype).eval()
    parameters = dict(reference.named_parameters())
    for name, target in model.targets():
        parameters.pop(name.removeprefix("model.")).copy_(target.into.reshape(target.shape))
    assert not parameters
    hidden = reference(input_ids=torch.tensor([token_ids], device=GPU)).last_hidden_state[0, -NUM_DECODES - 1 :]
    logits: Tensor = hidden @ model.embed_tokens.weight.to(dtype).T
    return logits.float()


@torch.inference_mode()
def test_logits_in_bfloat16_are_as_exact_as_the_references(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen2-vl-2b", weights=False)
    model = random_model(tmp_path)
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(0, 150_000, (NUM_PROMPT_TOKENS + NUM_DECODES,), generator=generator).tolist()
    runner, request = PagedRunner(model), Request(token_ids[:NUM_PROMPT_TOKENS])
    steps = [runner.prefill(request, 128)]
    for token_id in token_ids[NUM_PROMPT_TOKENS:]:  # one row: the small-batch kernels, the split attention
        request.token_ids.append(token_id)
        steps.append(runner.step([(request, 1)]))
    ours = torch.cat(steps).float()
    exact, theirs = (reference_logits(tmp_path, model, token_ids, dtype) for dtype in (torch.float32, torch.bfloat16))
    ours_off, theirs_off = (((logits - exact).norm() / exact.norm()).item() for logits in (ours, theirs))
    print(f"ours {ours_off:.2e} from float32, transformers' {theirs_off:.2e}")
    assert ours_off <= 1.2 * theirs_off
