"""DivPrune's selection against the plain recurrence over the matrix of all distances, on random features.

Both are timed in turn, round after round, in one process and on one thread, which BLAS takes from the environment.
Times are the processor's, so that other work on the machine does not count:

    OMP_NUM_THREADS=1 python experiments/speed/divprune.py --rounds 15
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from tokenreduce.flops import decoder_flops
from tokenreduce_plugins.divprune import diverse

SHAPES = ((576, 64), (2880, 320))
"""Visual tokens, and how many are kept: LLaVA-1.5 and LLaVA-NeXT at the published budgets."""

TEXT = 64
LLAMA = LlamaConfig()  # its defaults are those of the 7B model


def plain(features: Tensor, count: int) -> Tensor:
    """The recurrence, with the steps that official code takes."""
    unit = features / features.norm(dim=-1, keepdim=True)
    distances = 1 - unit @ unit.T
    picked = [int(distances.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(picked) < count:
        picked.append(int(distances[picked].min(dim=0).values.argmax()))
    return torch.tensor(picked)


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(tokens: int, count: int, rounds: int) -> dict[str, float]:
    """One row of the table; raises ``ValueError`` where the two do not pick the same tokens."""
    features = torch.randn(tokens, LLAMA.hidden_size, generator=torch.Generator().manual_seed(tokens))
    if not diverse(features, count).equal(plain(features, count)):
        raise ValueError(f"the picks differ for {tokens} -> {count} tokens")
    weight = torch.randn(LLAMA.intermediate_size, LLAMA.hidden_size)
    product = 2 * tokens * LLAMA.hidden_size * LLAMA.intermediate_size
    times = [
        (
            seconds(lambda: plain(features, count)),
            seconds(lambda: diverse(features, count)),
            seconds(lambda: features @ weight.T),
        )
        for _ in range(rounds)
    ]
    before, after, matmul = (statistics.median(each) for each in zip(*times, strict=True))
    rate = product / matmul
    prefill = decoder_flops([tokens + TEXT] * LLAMA.num_hidden_layers, LLAMA) / rate
    return {
        "tokens": tokens,
        "kept": count,
        "plain_milliseconds": 1e3 * before,
        "milliseconds": 1e3 * after,
        "times_faster": statistics.median(old / new for old, new, _ in times),
        "matmul_gflops_per_second": rate / 1e9,
        "prefill_seconds": prefill,
        "share_of_prefill": after / prefill,
    }


def table(rows: list[dict[str, float]]) -> str:
    lines = [
        "| tokens | plain recurrence, ms | `divprune`, ms | times faster | share of an unreduced 7B prefill |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['tokens']} to {row['kept']} | {row['plain_milliseconds']:.1f} | {row['milliseconds']:.1f} "
        f"| {row['times_faster']:.2f} | {100 * row['share_of_prefill']:.2f} % of {row['prefill_seconds']:.0f} s |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1" or torch.get_num_threads() != 1:
        parser.error("one thread is what is compared: start it with OMP_NUM_THREADS=1")
    rows = [measure(tokens, count, arguments.rounds) for tokens, count in SHAPES]
    result = {
        "command": f"OMP_NUM_THREADS=1 python experiments/speed/divprune.py --rounds {arguments.rounds}",
        "machine": f"{platform.machine()}, 1 thread, float32, {LLAMA.hidden_size} features a token",
        "torch": torch.__version__,
        "rows": rows,
    }
    Path(__file__).with_name("divprune.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
