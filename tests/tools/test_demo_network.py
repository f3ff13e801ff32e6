"""Training's packed network and its pre-processing must be those that transformers has."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference_smart_resize

from vlmrt.tools.demo import CHECKPOINT
from vlmrt.tools.demo.batches import Limits, pack
from vlmrt.tools.demo.data import Dialogue, dialogue
from vlmrt.tools.demo.drawing import Scenery
from vlmrt.tools.demo.in_process import TransformersChat
from vlmrt.tools.demo.network import Network, Shape
from vlmrt.tools.demo.optimizer import orthogonalised
from vlmrt.tools.demo.processing import MAX_PIXELS, MIN_PIXELS, patches, resized, smart_resize
from vlmrt.tools.demo.train import Trainer, run, save, schedule, to_device

LIMITS = Limits(dialogues=4, tokens=2048, patches=4096, units=32, answers=64)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on many threads, far slower on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> tuple[Network, TransformersChat]:
    """A two-layer network of bfloat16 values, and transformers' model of the checkpoint it was saved as."""
    torch.manual_seed(0)
    shape = Shape(
        vocab_size=1152, depth=2, embed_dim=64, hidden_size=64, intermediate_size=96, num_layers=2, num_kv_heads=1
    )
    network = Network(shape)
    network.initialise()
    network.load_state_dict({name: w.to(torch.bfloat16).float() for name, w in network.state_dict().items()})
    folder = tmp_path_factory.mktemp("small")
    save(folder, network, shape, tokenizer, {})
    return network.eval(), TransformersChat(folder)


@pytest.mark.parametrize("task", ["one_shape", "several_images", "moving", "no_picture", "reading"])
def test_packed_logits_are_those_of_transformers(
    task: str, small: tuple[Network, TransformersChat], tokenizer: Tokenizer
) -> None:
    network, chat = small
    rng = random.Random(task)
    chats = [_default_prompt(dialogue(rng, Scenery(), {task: 1.0})) for _ in range(2)]
    batch = to_device(pack(chats, tokenizer, LIMITS), torch.device("cpu"))
    with torch.no_grad():
        logits, wanted, _ = run(network, batch)
        answer = 0
        for one in chats:
            inputs = chat.inputs(one)
            last = answer + len(one.turns) - 1
            ours = logits[batch.target_answers == last][0]
            theirs = chat.model(**inputs).logits[0, -1]
            assert (ours - theirs).abs().max() < 1e-4
            expected = tokenizer.encode(one.turns[-1].answer + "<|im_end|>").ids
            assert wanted[batch.target_answers == last].tolist() == expected
            answer = last + 1


def _default_prompt(chat: Dialogue) -> Dialogue:
    return Dialogue(chat.turns, None)


@pytest.mark.parametrize("size", [(27, 31), (100, 100), (640, 480), (1280, 960), (900, 120), (40, 300), (168, 168)])
def test_pictures_become_the_patches_that_the_image_processor_makes(size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    reference: Any = Qwen2VLImageProcessorPil.from_pretrained(CHECKPOINT)(images=[image], return_tensors="pt")
    frame = resized(image)
    cut = torch.from_numpy(patches(frame))
    ours = Network(Shape(vocab_size=64, depth=1, num_layers=1)).normalised(torch.stack([cut, cut], dim=1))
    assert reference["image_grid_thw"].tolist() == [[1, frame.shape[0] // 14, frame.shape[1] // 14]]
    assert (ours - reference["pixel_values"]).abs().max() < 1e-5


def test_smart_resize_is_the_reference_s_for_every_shape_of_picture() -> None:
    for height in range(1, 1400, 67):
        for width in range(1, 1400, 71):
            if max(height, width) <= 200 * min(height, width):
                expected = reference_smart_resize(height, width, 28, MIN_PIXELS, MAX_PIXELS)
                assert smart_resize(height, width) == expected


def test_a_picture_too_long_for_its_width_is_refused() -> None:
    with pytest.raises(ValueError, match="1x300"):
        smart_resize(300, 1)


def test_a_batch_stops_at_the_first_dialogue_that_does_not_fit(tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    chats = [dialogue(rng, Scenery(), {"one_shape": 1.0}) for _ in range(8)]
    arrays = pack(chats, tokenizer, LIMITS)
    num_dialogues, num_tokens = (int(n) for n in arrays["counts"][:2])
    assert num_dialogues == LIMITS.dialogues
    assert num_tokens == arrays["dialogue_lengths"][:num_dialogues].sum()
    assert arrays["is_vision"][:num_tokens].sum() == arrays["unit_lengths"][: int(arrays["counts"][4])].sum() // 4


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    torch.manual_seed(1)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(2, 24, 40)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_a_few_steps_on_one_batch_lower_both_losses(tokenizer: Tokenizer) -> None:
    torch.manual_seed(2)
    shape = Shape(
        vocab_size=1152, depth=1, embed_dim=64, hidden_size=64, intermediate_size=96, num_layers=1, num_kv_heads=1
    )
    network = Network(shape)
    network.initialise()
    rng = random.Random(6)
    chats = [dialogue(rng, Scenery(), {"one_shape": 1.0}) for _ in range(4)]
    batch = to_device(pack(chats, tokenizer, LIMITS), torch.device("cpu"))
    trainer = Trainer(network, shape, torch.device("cpu"))
    first, *_, last = [trainer.step(batch, learning_rate=5e-3, cell_weight=0.5).tolist() for _ in range(12)]
    assert last[0] < 0.7 * first[0]
    assert last[1] < 0.9 * first[1]


def test_the_learning_rate_warms_up_and_falls_to_a_hundredth() -> None:
    assert schedule(0.0, step=0, peak=1.0) == pytest.approx(0.01)
    assert schedule(0.0, step=200, peak=1.0) == pytest.approx(1.0)
    assert schedule(1.0, step=5000, peak=1.0) == pytest.approx(0.01)
