"""Trains the demo model and saves it as a Qwen2-VL checkpoint.

    python -m vlmrt.tools.demo.train OUT --photos PHOTOS --minutes 9          # one GPU
    python -m vlmrt.tools.demo.train OUT --minutes 1 --small                  # a trial on a CPU

The loss is that of the answers alone, plus an auxiliary one through which every vision token names what its part of the
picture holds; without it the vision tower stays at chance for a long time. `--init` goes on from an earlier checkpoint.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from vlmrt.tools.demo import tokenizer as demo_tokenizer
from vlmrt.tools.demo.batches import CELL_HUES, CELL_KINDS, Arrays, Feed, Limits, pack
from vlmrt.tools.demo.data import held_out
from vlmrt.tools.demo.drawing import Scenery
from vlmrt.tools.demo.network import Lengths, Network, Shape, config
from vlmrt.tools.demo.optimizer import Muon
from vlmrt.tools.demo.tasks import KINDS, WEIGHTS

TRANSFORMERS_VERSION = "5.17.0"  # written into config.json: loaders of 5.x warn about its absence


@dataclass(frozen=True)
class Batch:
    """A packed batch on the device."""

    frames: Tensor
    pairs: Tensor
    vision_positions: Tensor
    vision_lengths: Lengths
    cells: Tensor
    ids: Tensor
    positions: Tensor
    is_vision: Tensor
    targets: Tensor  # where an answer's token is to be predicted: index of the position before it
    target_answers: Tensor  # the answer each of those belongs to
    lengths: Lengths
    num_answers: int
    num_dialogues: int


def _lengths(sizes: Any, device: torch.device) -> Lengths:
    ends = torch.from_numpy(sizes.astype("int32")).cumsum(0, dtype=torch.int32)
    return Lengths(F.pad(ends, (1, 0)).to(device, non_blocking=True), int(sizes.max()) if len(sizes) else 0)


def to_device(arrays: Arrays, device: torch.device) -> Batch:
    """Copies one batch to the device, asynchronously where its memory is pinned."""
    dialogues, tokens, frames, vision, units, answers = (int(n) for n in arrays["counts"][:6])

    def copied(name: str, stop: int) -> Tensor:
        return torch.from_numpy(arrays[name][:stop]).to(device, non_blocking=True, copy=True)

    answer_of = copied("answer_of", tokens)
    targets = (answer_of >= 0).nonzero().flatten()
    return Batch(
        frames=copied("frames", frames),
        pairs=copied("pairs", vision),
        vision_positions=copied("vision_positions", vision),
        vision_lengths=_lengths(arrays["unit_lengths"][:units], device),
        cells=copied("cells", vision // 4),
        ids=copied("ids", tokens).long(),
        positions=copied("positions", tokens).T,
        is_vision=copied("is_vision", tokens),
        targets=targets - 1,
        target_answers=answer_of[targets].long(),
        lengths=_lengths(arrays["dialogue_lengths"][:dialogues], device),
        num_answers=answers,
        num_dialogues=dialogues,
    )


def run(network: Network, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """One forward pass: logits of every answer token [A, vocab], the tokens wanted there, and the vision rows."""
    rows = None
    if batch.vision_lengths.longest:
        pixels = network.normalised(batch.frames[batch.pairs.long()])
        rows = network.visual(pixels, batch.vision_positions, batch.vision_lengths)
    hidden = network(batch.ids, batch.positions, batch.lengths, batch.is_vision, rows)
    return network.logits(hidden[batch.targets]), batch.ids[batch.targets + 1], rows


def answer_loss(logits: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
    """Cross entropy in which an answer of n tokens weighs as sqrt(n), so that descriptions do not drown a yes or no."""
    sizes = torch.bincount(batch.target_answers, minlength=batch.num_answers).clamp(min=1)
    weights = sizes.float().rsqrt()[batch.target_answers]
    losses = F.cross_entropy(logits.float(), wanted, reduction="none")
    return (losses * weights).sum() / weights.sum()


def cell_loss(rows: Tensor, cells: Tensor, heads: nn.ModuleList) -> Tensor:
    """How badly vision rows name what their cell holds; cells that hold something count as much as all empty ones."""
    total = torch.zeros((), device=rows.device)
    for head, labels in zip(heads, cells.long().T, strict=True):
        losses = F.cross_entropy(head(rows).float(), labels, reduction="none")
        held = (labels > 0).float()
        total = total + 0.5 * (losses * held).sum() / held.sum().clamp(min=1)
        total = total + 0.5 * (losses * (1 - held)).sum() / (1 - held).sum().clamp(min=1)
    return total


@torch.no_grad()
def measure(network: Network, batches: list[Arrays], device: torch.device) -> dict[str, tuple[int, int]]:
    """Right and all last questions by kind.

    An answer counts if every token is the likeliest after the right ones before it: greedy decoding then gives it.
    """
    network.eval()
    right: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[str] = collections.Counter()
    for arrays in batches:
        batch = to_device(arrays, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, wanted, _ = run(network, batch)
        wrong = torch.zeros(batch.num_answers, device=device)
        wrong.index_add_(0, batch.target_answers, (logits.argmax(-1) != wanted).float())
        is_first = [*arrays["answer_is_first"][: batch.num_answers], True]
        for answer, errors in enumerate(wrong.tolist()):
            if is_first[answer + 1]:  # the last of its dialogue
                kind = KINDS[arrays["answer_kinds"][answer]]
                seen[kind] += 1
                right[kind] += errors == 0
    network.train()
    return {kind: (right[kind], seen[kind]) for kind in KINDS if seen[kind]}


def _percent(counts: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    total = (sum(r for r, _ in counts.values()), sum(n for _, n in counts.values()))
    return {kind: round(100 * r / n, 1) for kind, (r, n) in {"all": total, **counts}.items()}


def held_out_batches(tokenizer: Tokenizer, scenery: Scenery, per_kind: int, limits: Limits) -> list[Arrays]:
    """Batches of questions of every kind, a quarter of them after other turns."""
    rng = random.Random(20_260_101)
    chats = [held_out(rng, scenery, kind, several_turns=k % 4 == 3) for kind in KINDS for k in range(per_kind)]
    return [pack(chats[k : k + 256], tokenizer, limits) for k in range(0, len(chats), 256)]


def save(folder: Path, network: Network, shape: Shape, tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    """Writes the whole checkpoint, weights in bfloat16."""
    demo_tokenizer.write_files(folder, tokenizer)
    token_ids = {token: demo_tokenizer.token_id(tokenizer, token) for token in demo_tokenizer.SPECIAL_TOKENS}
    settings = config(shape, token_ids, TRANSFORMERS_VERSION)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    weights = {name: w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in network.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _pin(feed: Feed) -> None:
    """Page-locks the feed's memory, so that copies to the device need no second buffer and do not wait."""
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    for arrays, buffer in zip(feed.slots, feed.buffers, strict=True):
        cudart.cudaHostRegister(arrays["counts"].ctypes.data, len(buffer), 0)


class Trainer:
    """The network, its optimizers and one step."""

    def __init__(self, network: Network, shape: Shape, device: torch.device) -> None:
        self.network, self.device = network, device
        self.heads = nn.ModuleList(nn.Linear(shape.hidden_size, len(c)) for c in (CELL_KINDS, CELL_HUES)).to(device)
        named = dict(network.named_parameters())
        matrices = [p for name, p in named.items() if p.ndim >= 2 and "embed_tokens" not in name]
        others = [p for name, p in named.items() if p.ndim < 2 or "embed_tokens" in name]
        self.muon = Muon(matrices, weight_decay=0.02)
        self.adam = torch.optim.AdamW([*others, *self.heads.parameters()], betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, batch: Batch, learning_rate: float, cell_weight: float) -> Tensor:
        """One update; returns the answers' and the cells' loss, still on the device."""
        for group in self.adam.param_groups:
            group["lr"] = learning_rate
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits, wanted, rows = run(self.network, batch)
            answers = answer_loss(logits, wanted, batch)
            cells = cell_loss(rows, batch.cells, self.heads) if rows is not None else torch.zeros_like(answers)
        self.adam.zero_grad(set_to_none=True)
        self.network.zero_grad(set_to_none=True)
        (answers + cell_weight * cells).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.adam.step()
        self.muon.step(learning_rate)
        return torch.stack([answers.detach(), cells.detach()])


def schedule(elapsed: float, step: int, peak: float) -> float:
    """The learning rate: 100 steps of warm-up, then a cosine to 1 % over the run's wall time (elapsed is its share)."""
    return peak * min(1.0, (step + 1) / 100) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, elapsed))))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--photos", type=Path, help="folder with train/, held_out/ (pictures) and fonts/")
    parser.add_argument("--init", type=Path, help="checkpoint to go on from")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument(
        "--cell-weight", type=float, default=0.5, help="of the auxiliary loss at first; falls to a fifth"
    )
    parser.add_argument(
        "--weights", type=json.loads, default={}, help='JSON of task weights that differ: {"reading": 3}'
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="small batches, for a CPU")
    parser.add_argument("--eval-every", type=float, default=90.0, help="seconds")
    parser.add_argument("--eval-per-kind", type=int, default=100)
    return parser.parse_args()


def _sceneries(photos: Path | None) -> tuple[Scenery, Scenery]:
    if photos is None:
        return Scenery(), Scenery()
    return Scenery.from_folders(photos / "train", photos / "fonts"), Scenery.from_folders(photos / "held_out")


def main() -> None:
    """Trains for a given time and saves the checkpoint, also now and then on the way."""
    arguments = _arguments()
    began = time.monotonic()
    limits = Limits(24, 6144, 6144, 96, 512) if arguments.small else Limits()
    training_scenery, held_out_scenery = _sceneries(arguments.photos)
    if arguments.init:
        tokenizer = Tokenizer.from_file(str(arguments.init / "tokenizer.json"))
    else:
        tokenizer = demo_tokenizer.build(400 if arguments.small else 4000)
    demo_tokenizer.write_files(arguments.out, tokenizer)
    weights = {**WEIGHTS, **arguments.weights}
    feed = Feed(
        arguments.out / "tokenizer.json",
        training_scenery,
        weights,
        num_workers=arguments.workers,
        limits=limits,
        seed=arguments.seed,
    )
    held = held_out_batches(tokenizer, held_out_scenery, arguments.eval_per_kind, Limits(256, 65536, 65536, 1024, 2048))
    shape = Shape(vocab_size=-(-tokenizer.get_vocab_size() // 64) * 64)
    torch.manual_seed(arguments.seed)
    network = Network(shape)
    network.initialise()
    if arguments.init:
        network.load_state_dict(load_file(arguments.init / "model.safetensors"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).train()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        _pin(feed)
    trainer = Trainer(network, shape, device)
    num_parameters = sum(p.numel() for p in network.parameters())
    print(
        f"{device}: {num_parameters / 1e6:.2f} M parameters, ready after {time.monotonic() - began:.0f} s", flush=True
    )
    record: dict[str, Any] = {"parameters": num_parameters, "task_weights": weights, "minutes": arguments.minutes}
    record |= {"seed": arguments.seed, "learning_rate": arguments.learning_rate, "device": device.type}
    record |= {"continued": arguments.init is not None}
    _train(arguments, trainer, feed, held, record, tokenizer, shape)
    feed.close()


def _train(
    arguments: argparse.Namespace,
    trainer: Trainer,
    feed: Feed,
    held: list[Arrays],
    record: dict[str, Any],
    tokenizer: Tokenizer,
    shape: Shape,
) -> None:
    device, cuda = trainer.device, trainer.device.type == "cuda"
    start, seconds = time.monotonic(), arguments.minutes * 60
    evaluated, samples, step = start, 0, 0
    running = torch.zeros(2, device=device)
    in_use: collections.deque[tuple[int, Any]] = collections.deque()
    while (elapsed := time.monotonic() - start) < seconds:
        share = elapsed / seconds
        slot = feed.next_slot()
        batch = to_device(feed.slots[slot], device)
        copied: Any = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        if copied:
            copied.record()
        in_use.append((slot, copied))
        while in_use and (in_use[0][1] is None or in_use[0][1].query()):
            feed.give_back(in_use.popleft()[0])
        cell_weight = arguments.cell_weight * (1 - 0.8 * share)
        losses = trainer.step(batch, schedule(share, step, arguments.learning_rate), cell_weight)
        running = losses if step == 0 else 0.95 * running + 0.05 * losses
        samples, step = samples + batch.num_dialogues, step + 1
        if step % (50 if cuda else 10) == 0:
            answers, cells = running.tolist()
            speed = samples / (time.monotonic() - start)
            print(
                f"{elapsed:5.0f} s step {step} dialogues {samples} loss {answers:.4f} cells {cells:.3f}"
                f" {speed:.0f}/s waiting {feed.waiting()}",
                flush=True,
            )
        if time.monotonic() - evaluated > arguments.eval_every:
            evaluated = time.monotonic()
            print(f"      held out {json.dumps(_percent(measure(trainer.network, held, device)))}", flush=True)
            save(arguments.out, trainer.network, shape, tokenizer, record | {"steps": step, "dialogues": samples})
    scores = _percent(measure(trainer.network, held, device))
    print(f"final: {step} steps, {samples} dialogues, held out {json.dumps(scores)}", flush=True)
    record |= {"steps": step, "dialogues": samples, "teacher_forced_percent": scores}
    save(arguments.out, trainer.network, shape, tokenizer, record)


if __name__ == "__main__":
    main()
