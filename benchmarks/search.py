"""What dynamic model selection's search takes, beside the training that it is for.

In each round some devices draw new limits and a sub-network is searched for each of them, as
`model_selection` does; then one of them trains its sub-network, here, on inputs that are made up.

    python benchmarks/search.py --model resnet18,blocks=unit,width=16 --rounds 100

The share is that of the searches of a round in the training of its clients, one after the other.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
from machine import describe

from fedlean.algorithm import Device
from fedlean.core import SubModel, Work, generator
from fedlean.cost.profile import load_profile
from fedlean.engine.open import open_engine
from fedlean.engine.protocol import SGD
from fedlean.models.catalog import build
from fedlean.models.initialise import init_params
from fedlean.submodels.levels import rates_from
from fedlean.submodels.search import Search
from fedlean.submodels.supernet import supernet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet18,blocks=unit,width=16")
    parser.add_argument("--input-shape", default="3x32x32")
    parser.add_argument("--widths", default="1 0.5 0.25")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--cohort", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="local steps of a client")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shape = tuple(map(int, options.input_shape.split("x")))
    spec = build(options.model, shape, 10)
    nets = supernet(spec, rates_from(options.widths), scaler=True)
    work = Work(options.steps, options.batch, optimizer_floats=1)
    search, profile = Search(nets, work, 0.2, 5, 0), load_profile("raspberry_pi_4")
    low, high = (search.needs(net).memory_bytes for net in (nets.smallest, nets.largest))
    began = time.perf_counter()
    base = search.begun(16)
    print(f"{nets.count} sub-networks; a data base of 18 takes {time.perf_counter() - began:.3f} s")
    engine, params, random = open_engine("native", 1), init_params(spec, 0), generator(0, 0, 0, "")
    searches, trainings = [], []
    for round in range(1, options.rounds + 1):
        began = time.perf_counter()
        for client in range(options.cohort):
            limit = int(random.uniform(low, 1.25 * high))
            grown = search.with_more(base, search.drawn(round, client))
            net = search.fitting(grown, Device(client, memory_bytes=limit), profile)
            base = grown
        searches.append(time.perf_counter() - began)
        cut = nets.cut(net)
        x = random.standard_normal((options.batch, *shape), dtype=np.float32)
        y = random.integers(0, 10, options.batch)
        began = time.perf_counter()
        session = engine.open(
            cut.spec,
            cut.take(params),
            SubModel(),
            batch_size=options.batch,
            optimizer=SGD(0.01, 0.9),
        )
        for _ in range(options.steps):
            session.step(x, y)
        trainings.append(options.cohort * (time.perf_counter() - began))
    share = sum(searches) / sum(trainings)
    print(
        f"{options.rounds} rounds of {options.cohort}: a round's searches take "
        f"{1e3 * median(searches):.1f} ms (median; mean {1e3 * np.mean(searches):.1f}, most "
        f"{1e3 * max(searches):.1f}), its training {1e3 * median(trainings):.0f} ms; "
        f"share {share:.2%}; {len(base)} sub-networks are known in the end"
    )
    if options.json:
        facts = {"searches": searches, "trainings": trainings, "share": share}
        options.json.write_text(json.dumps({"machine": describe(), **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
