"""A tower exported to ONNX and run by ONNX Runtime on the CPU: the rows of torch, for batches of any sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.actors.vit.conftest import Checkpoint, mixed_batch
from tests.actors.vit.test_actor import PAGE_ROWS, SCHEDULER, SIZES, picture
from tests.support import FakeContext, FakeMemory, make_config, peer_up
from vlmrt.actors.models.checkpoint_files import check_weight_files
from vlmrt.actors.models.registry import family
from vlmrt.actors.models.vision_grid import GridThw
from vlmrt.actors.models.vision_tower import VisionTower
from vlmrt.actors.vit.actor import VitActor
from vlmrt.actors.vit.encoder import Encoder
from vlmrt.actors.vit.engines.engine import Pixels, VisionEngine
from vlmrt.actors.vit.engines.engine_files import ONNX_FILE, EngineSpec, write_about
from vlmrt.actors.vit.engines.onnxruntime import OnnxRuntimeSession
from vlmrt.actors.vit.engines.torch import TorchEngine
from vlmrt.actors.vit.engines.traced_tower import export_tower
from vlmrt.actors.vit.engines.whole_batch import WholeBatchEngine
from vlmrt.actors.vit.loading import load_encoder
from vlmrt.kernels.patchify import patchify
from vlmrt.runtime.actor import ActorContext
from vlmrt.runtime.config import MemoryOptions, ParallelOptions
from vlmrt.runtime.control_messages import SchedulerReady
from vlmrt.runtime.errors import StartupError
from vlmrt.runtime.messages import EmbedsReady, Encode, MmHash
from vlmrt.runtime.shared_memory import PixelArena
from vlmrt.runtime.slab import num_pages_for, row_index

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

CPU = torch.device("cpu")
NUM_BATCHES = 20


@dataclass
class Exported:
    """A checkpoint's tower, and where its files for ONNX Runtime are."""

    checkpoint: Checkpoint
    tower: VisionTower
    directory: Path

    def engine(self, max_call_patches: int = 8192) -> WholeBatchEngine:
        vision, processing = self.checkpoint.config.vision, self.checkpoint.processing
        session = OnnxRuntimeSession(self.directory, CPU, 1, 1.0)
        return WholeBatchEngine(session, vision, processing, CPU, torch.float32, max_call_patches)


@pytest.fixture(scope="session")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    files = check_weight_files(checkpoint.directory)
    config = checkpoint.config
    tower = family(config.model_type).load_vision(files, config, CPU, torch.float32)
    directory = tmp_path_factory.mktemp("exported")
    export_tower(tower, directory)
    write_about(directory, EngineSpec("onnx", config.model_type, "", config.vision, "float32", 23, {}))
    return Exported(checkpoint, tower, directory)


def encode(engine: VisionEngine[Any], images: list[Pixels], grids: list[GridThw]) -> Tensor:
    run = engine.prepare(images, grids)
    while not engine.run_quantum(run):
        pass
    return engine.rows(run)


def exact_rows(checkpoint: Checkpoint, images: list[Pixels], grids: list[GridThw]) -> Tensor:
    """Of the reference, in float64."""
    patches = patchify([torch.from_numpy(image) for image in images], checkpoint.processing, torch.float64)
    tower = checkpoint.reference_tower.double()
    try:
        rows: Tensor = tower(patches, grid_thw=torch.tensor(grids)).pooler_output
    finally:
        tower.float()
    return rows


@torch.inference_mode()
def test_rows_of_mixed_batches_are_as_exact_as_those_of_torch(exported: Exported) -> None:
    engine = exported.engine()
    eager = TorchEngine(exported.tower, exported.checkpoint.processing, CPU, 1e6)
    for seed in range(NUM_BATCHES):
        images, grids = mixed_batch(seed)
        exact = exact_rows(exported.checkpoint, images, grids)
        rows = encode(engine, images, grids)
        assert rows.dtype == torch.float32
        assert F.cosine_similarity(rows.double(), exact, dim=1).min() > 0.9999
        eager_error, error = ((given - exact).abs().max() for given in (encode(eager, images, grids), rows))
        assert error <= 2 * eager_error + torch.finfo(torch.float32).eps / 2 * exact.abs().max()


def test_the_weights_lie_beside_the_graph(exported: Exported) -> None:
    graph = (exported.directory / ONNX_FILE).stat().st_size
    weights = (exported.directory / f"{ONNX_FILE}.data").stat().st_size
    assert weights > 0.9 * sum(parameter.nbytes for parameter in exported.tower.parameters())
    assert graph < weights


def test_attention_is_one_operator_of_each_layer(exported: Exported) -> None:
    import onnx

    graph = onnx.load(exported.directory / ONNX_FILE, load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("Attention") == exported.tower.num_layers
    assert "Softmax" not in kinds


@torch.inference_mode()
def test_calls_of_fewer_patches_change_no_row(exported: Exported) -> None:
    images, grids = mixed_batch(3)
    assert len(grids) > 2
    whole, cut = exported.engine(), exported.engine(max_call_patches=1)
    expected = encode(whole, images, grids)
    run = cut.prepare(images, grids)
    with pytest.raises(ValueError, match="calls have not been made"):
        cut.rows(run)
    for _ in grids[1:]:
        assert not cut.run_quantum(run)
    assert cut.run_quantum(run)
    torch.testing.assert_close(cut.rows(run), expected, rtol=1e-5, atol=2e-5)
    two = exported.engine(max_call_patches=math.prod(grids[0]) + math.prod(grids[1]))
    run = two.prepare(images, grids)
    assert len(run.calls[0].patches) == math.prod(grids[0]) + math.prod(grids[1])


def test_a_frame_of_too_many_patches_is_refused(exported: Exported) -> None:
    image: Pixels = np.zeros((1, 14 * 4, 14 * 4098, 3), np.uint8)
    with pytest.raises(ValueError, match="a frame of 16392 patches; this engine takes at most 16384"):
        exported.engine().prepare([image], [(1, 4, 4098)])


def test_a_file_that_cannot_be_loaded_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / ONNX_FILE).write_bytes(b"not a graph")
    with pytest.raises(StartupError, match=r"tower\.onnx: ONNX Runtime cannot load it"):
        OnnxRuntimeSession(tmp_path, CPU, 1, 1.0)


def test_a_package_without_the_cuda_provider_names_the_one_that_has_it(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="has no CUDA provider; pip uninstall onnxruntime, then pip install 'vlmrt"):
        OnnxRuntimeSession(tmp_path, torch.device("cuda:0"), 1, 1.0)


@torch.inference_mode()
def test_memory_that_is_not_there_is_torchs_error_and_others_stay_themselves(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = OnnxRuntimeSession(exported.directory, CPU, 1, 1.0)
    vision, processing = exported.checkpoint.config.vision, exported.checkpoint.processing
    engine = WholeBatchEngine(session, vision, processing, CPU, torch.float32, 8192)
    images, grids = mixed_batch(0)
    expected = encode(engine, images, grids)
    for text, kind in (
        ("BFCArena: Failed to allocate memory for requested buffer of size 9", torch.OutOfMemoryError),
        ("CUDA failure 2: out of memory", torch.OutOfMemoryError),
        ("CUDA failure 700: an illegal memory access was encountered", RuntimeError),
    ):

        def fail(*_: object, text: str = text) -> None:
            raise RuntimeError(text)

        with monkeypatch.context() as patch:
            patch.setattr(session._session, "run_with_iobinding", fail)
            with pytest.raises(RuntimeError, match=text.partition(":")[0]) as raised:
                encode(engine, images, grids)
            assert raised.type is kind
    assert torch.equal(encode(engine, images, grids), expected)


async def test_the_actor_encodes_with_it(exported: Exported, tmp_path: Path) -> None:
    config = make_config(
        exported.checkpoint.directory,
        memory=MemoryOptions(embedding_cache_gib=1 / 1024, page_rows=PAGE_ROWS),
        parallel=ParallelOptions(vit_engine="onnxruntime", vit_engine_directory=str(exported.directory)),
    )
    memory = FakeMemory()
    encoders: list[Encoder] = []

    def load(context: ActorContext) -> Encoder:
        encoders.append(load_encoder(context))
        return encoders[0]

    async with FakeContext("vit:0", tmp_path, config, memory=memory) as context:
        actor = VitActor(cast(ActorContext, context), load)
        await actor.start()
        assert context.stages == [("loading onnx", 0, 1), ("loading onnx", 1, 1)]
        await actor.peer_up(peer_up("scheduler:0", SchedulerReady()))
        arena = PixelArena.create(FakeContext("media:0", tmp_path, config, memory=memory), 1 << 22)
        messages, first_page = [], 0
        for number, size in enumerate(SIZES):
            each = picture(number, size)
            ref = arena.write(each.pixels)
            assert ref is not None
            num_pages = num_pages_for(each.num_rows, PAGE_ROWS)
            pages = tuple(range(first_page, first_page + num_pages))
            first_page += num_pages
            height, width = each.pixels.shape[1:3]
            messages.append(Encode(number, MmHash("h"), each.grid_thw, ref, (1, height, width, 3), pages))
            await actor.handle(messages[-1], SCHEDULER)
        for _ in messages:
            answer = (await context.outbox.next(60.0)).message
            assert isinstance(answer, EmbedsReady), answer
        for number, (message, size) in enumerate(zip(messages, SIZES, strict=True)):
            expected = picture(number, size).rows(exported.checkpoint)
            index = torch.from_numpy(row_index(message.pages, 0, len(expected), PAGE_ROWS))
            rows = encoders[0].slab.tensor()[index]
            assert (rows - expected).abs().max() <= 2e-6 * expected.abs().max()
        await actor.stop(5.0)
        arena.close()
