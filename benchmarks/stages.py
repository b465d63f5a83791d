"""What each stage of block-wise training costs, as shares of training the whole model at once.

At stage t the blocks before it are frozen and the others train: the worst case of a stage, without
an output module in place of the later blocks, and with one.  Three ways: one session of the task's
model; two, the frozen beginning in micro-batches beside the rest; and the rest on activations that
were computed once (on disk, `--examples` a client).  Momentum SGD, the native engine's plans, which
tests hold to the byte, and the FLOPs of a round of `--steps` steps.  The last lines are over all
stages with their output modules.

    python benchmarks/stages.py --model resnet18 --batch 128 --json stages.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fedlean.core import ClientTask, SubModel, Work
from fedlean.cost.price import cost
from fedlean.cost.profile import load_profile
from fedlean.freezing.beginning import frozen_blocks, split
from fedlean.freezing.output_module import output_module
from fedlean.models.mobilenetv3 import mobilenetv3_small
from fedlean.models.resnet import resnet18
from fedlean.spec import ModelSpec
from fedlean.submodels.stages import graft, upto
from fedlean.train.work import behind_cached, behind_frozen, only_sgd

MODELS = {"resnet18": resnet18, "mobilenetv3_small": mobilenetv3_small}
PROFILE = load_profile("generic")


@dataclass(frozen=True)
class Row:
    """Shares of the whole model's memory (peak) and FLOPs."""

    stage: int
    head: str
    way: str
    memory: float
    flops: float


def rows(spec: ModelSpec, batch: int, steps: int, micro: int, examples: int) -> Iterator[Row]:
    """A body block a stage; what comes before the first belongs to it, the head to the last."""
    blocks = list(spec.blocks)
    body = [name for name in blocks[1:] if len(spec.shapes[spec.blocks[name][-1].name]) == 3]
    whole = price(task(spec, frozenset(), batch, steps), None)
    for number, block in enumerate(body, start=1):
        before = blocks[: blocks.index(block)] if number > 1 else []
        for head in ("whole model", "output module"):
            last = number == len(body)
            if head == "output module" and last:
                continue  # the last stage has the model's own end
            model = spec if head == "whole model" else staged(spec, block)
            order = task(model, frozen_blocks(model, before), batch, steps)
            for way, works in ways(order, micro, examples).items():
                found = price(order, works)
                shares = (part / of for part, of in zip(found, whole, strict=True))
                yield Row(number, head, way, *shares)


def staged(spec: ModelSpec, block: str) -> ModelSpec:
    """Up to the block, then the output module in place of the later ones."""
    end = spec.blocks[block][-1].name
    return graft(upto(spec, end), output_module(spec, block), output=True)


def task(spec: ModelSpec, frozen: frozenset[str], batch: int, steps: int) -> ClientTask:
    hparams = {"local_steps": steps, "batch_size": batch, "momentum": 0.9}
    return ClientTask(1, "train", 0, 0, spec, {}, SubModel(frozen=frozen), hparams)


def ways(order: ClientTask, micro: int, examples: int) -> dict[str, tuple[Work, ...]]:
    found = {"one session": only_sgd(order)}
    if order.sub_model.frozen:
        cut = split(order.spec, order.sub_model.frozen).name
        found[f"micro-batches of {micro}"] = behind_frozen(order, cut, micro_batch=micro)
        found["computed once"] = behind_cached(
            order, cut, micro_batch=micro, examples=examples, on_disk=True
        )
    return found


def price(order: ClientTask, works: tuple[Work, ...] | None) -> tuple[int, int]:
    """(peak memory, FLOPs)."""
    found = cost(order, works or only_sgd(order), PROFILE)
    return found.peak_memory_bytes, found.flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="resnet18")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--blocks", choices=("stage", "unit"), default="unit")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    spec = MODELS[given.model]((3, given.side, given.side), 10, blocks=given.blocks)
    table = list(rows(spec, given.batch, given.steps, given.micro_batch, given.examples))
    print(f"{given.model}, {given.side}x{given.side}, batch {given.batch}, blocks: {given.blocks}")
    print(f"{'stage':>5}  {'head':13}  {'way':20}  {'memory':>6}  {'FLOPs':>6}")
    for row in table:
        print(f"{row.stage:5}  {row.head:13}  {row.way:20}  {row.memory:6.3f}  {row.flops:6.3f}")
    for way in dict.fromkeys(row.way for row in table):
        memory = [one.memory for one in stages(table, way)]
        print(f"{way}: mean memory {sum(memory) / len(memory):.3f}, most {max(memory):.3f}")
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in table], indent=1))


def stages(table: list[Row], way: str) -> Iterator[Row]:
    """The stages with their output modules; the first, which has no beginning, in one session."""
    for stage in dict.fromkeys(row.stage for row in table):
        rows = [row for row in table if row.stage == stage]
        head = "output module" if any(row.head == "output module" for row in rows) else rows[0].head
        by_way = {row.way: row for row in rows if row.head == head}
        yield by_way.get(way, by_way["one session"])


if __name__ == "__main__":
    main()
