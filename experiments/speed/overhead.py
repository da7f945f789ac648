"""What a reducer costs besides the model's own work, in milliseconds of processor time on one thread.

On a random LLaVA of 576 visual tokens, so narrow that its own work is small. The first column is what attaching and
taking out costs; the second all that a call adds, selecting included, on a model whose layers do nothing; both are the
least of all rounds, which no other process on the machine can make smaller.

    python experiments/speed/overhead.py --rounds 15
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenreduce import reduce_tokens
from tokenreduce.testing import prompts, tiny_llava

REDUCERS = ("uniform", "fopru_rank", "divprune", "visionzip", "fastv", "pyramiddrop", "dart", "sparsevlm", "vtw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the figures into this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = tiny_llava(grid=24)
    for layer in model.model.language_model.layers:
        layer.mlp.forward = _nothing
    inputs = prompts(model, [1])
    figures: dict[str, dict[str, float]] = {}
    for name in REDUCERS:
        rounds = [_timed(model, inputs, name) for _ in range(arguments.rounds)]
        plain, attaching, calling = (1000 * min(column) for column in zip(*rounds, strict=True))
        figures[name] = {"attach_ms": round(attaching, 2), "call_ms": round(calling, 2), "plain_ms": round(plain, 2)}
        print(f"{name:12}", *(f"{figure} {value:7.2f}" for figure, value in figures[name].items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _nothing(states: Tensor) -> Tensor:
    return torch.zeros_like(states)


def _timed(model: Any, inputs: dict[str, Any], name: str) -> tuple[float, float, float]:
    """Seconds of a plain call, of attaching a reducer and taking it out, and of a reduced call."""
    with torch.no_grad():
        start = time.process_time()
        model(**inputs)
        plain = time.process_time()
        with reduce_tokens(model, name):
            attached = time.process_time()
            model(**inputs)
            called = time.process_time()
        return plain - start, time.process_time() - called + attached - plain, called - attached


if __name__ == "__main__":
    main()
