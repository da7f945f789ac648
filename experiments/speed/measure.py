"""How much of the ideal speed-up each reducer really gives, on a LLaVA-shaped model of random weights.

Every condition is timed in turn, round after round, in one process and on one thread, and compared with the plain
model on the same attention kernel. The ideal is what the FLOPs that are left, the method's own scoring included, would
take at the plain model's rate.

    python experiments/speed/measure.py --rounds 7
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tokenreduce import create, reduce_tokens
from tokenreduce.evaluation.costs import prefill_cost
from tokenreduce.reducer import AtDecoder, AtProjector, TokenReducer
from tokenreduce.signals import EncoderAttention
from tokenreduce.testing import Identity

HERE = Path(__file__).parent
TEXT = 64
DECODED = 16
CONDITIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "fopru_rank 64": ("fopru_rank", {"keep": 64}),
    "fopru_row 72": ("fopru_row", {"keep": 72}),
    "uniform 64": ("uniform", {"keep": 64}),
    "pool 64": ("pool", {"keep": 64}),
    "divprune 64": ("divprune", {"keep": 64}),
    "vtc_cls 64": ("vtc_cls", {"keep": 64}),
    "visionzip 64": ("visionzip", {"keep": 64}),
    "fastv K=2 R=50 %": ("fastv", {"layer": 2, "keep": 0.5}),
    "fastv K=2 R=75 %": ("fastv", {"layer": 2, "keep": 0.25}),
    "pyramiddrop": ("pyramiddrop", {}),
    "vtw K=4": ("vtw", {"layer": 4}),
}


def build(layers: int, width: int, attention: str) -> LlavaForConditionalGeneration:
    """CLIP ViT-L/14-336 and a Llama of ``layers`` x ``width``."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=width // 128,
            num_key_value_heads=width // 128,
            vocab_size=1024,
        ),
        image_token_id=3,
        image_seq_length=576,
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


class Clock:
    """Seconds that the vision side and the language model took in the last call."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        self.model = model.model
        self.vision = self.language = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time both parts of every call within."""
        parts = {(self.model, "get_image_features"): "vision", (self.model.language_model, "forward"): "language"}
        for (module, name), attribute in parts.items():
            setattr(module, name, self._timed(getattr(module, name), attribute))
        try:
            yield
        finally:
            for module, name in parts:
                delattr(module, name)

    def _timed(self, call: Callable[..., Any], attribute: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            setattr(self, attribute, time.perf_counter() - start)
            return result

        return timed


def conditions(model: LlavaForConditionalGeneration) -> dict[str, TokenReducer | None]:
    """The plain model, the identity at two sites, and the methods."""
    watched = (EncoderAttention(-2),)
    return {
        "plain": None,
        "identity, projector, watching": Identity(site=AtProjector(keep=1.0, sees=watched)),
        "identity, decoder layer 2": Identity(site=AtDecoder(layer=2, keep=1.0)),
        **{label: create(name, **knobs) for label, (name, knobs) in CONDITIONS.items()},
    }


def attached(model: LlavaForConditionalGeneration, reducer: TokenReducer | None) -> Any:
    return nullcontext() if reducer is None else reduce_tokens(model, reducer)


def flops(
    model: LlavaForConditionalGeneration, reducer: TokenReducer | None, inputs: dict[str, Any]
) -> dict[str, float]:
    """What the language model must compute with causal attention, and what the method computes besides."""
    with attached(model, reducer or create("none")) as attachment, sdpa_kernel(SDPBackend.MATH):
        counter = FlopCounterMode(display=False)
        with counter:
            model(**inputs, logits_to_keep=1)
    (square,) = prefill_cost(model, attachment.samples, causal=False)
    (causal,) = prefill_cost(model, attachment.samples)
    scoring = counter.get_total_flops() - square.vision_flops - square.llm_flops
    return {"language": causal.llm_flops, "scoring": max(0.0, scoring), "layer_mean": causal.layer_mean}


def prefill(
    model: LlavaForConditionalGeneration, inputs: dict[str, Any], rounds: int
) -> Iterator[dict[str, dict[str, Any]]]:
    """Medians of interleaved rounds, and ratios to the plain model taken round by round; anew after every round."""
    clock = Clock(model)
    reducers = conditions(model)
    work = {label: flops(model, reducer, inputs) for label, reducer in reducers.items()}
    seconds: dict[str, list[tuple[float, float]]] = {label: [] for label in reducers}
    for turn in range(rounds + 1):  # the first warms up
        for label, reducer in reducers.items():
            with attached(model, reducer), clock.watching():
                start = time.perf_counter()
                model(**inputs, logits_to_keep=1)
                whole = time.perf_counter() - start
            if turn:
                seconds[label].append((clock.vision, whole - clock.vision))
        print(f"round {turn} of {rounds}", flush=True)
        if turn:
            yield {
                label: compared(measured, seconds["plain"], work[label], work["plain"])
                for label, measured in seconds.items()
            }


def compared(
    measured: list[tuple[float, float]],
    plain: list[tuple[float, float]],
    work: dict[str, float],
    full: dict[str, float],
) -> dict[str, Any]:
    """One condition's row: (vision, rest) seconds of its rounds against those of the plain model."""
    pairs = list(zip(plain, measured, strict=True))
    ratio = statistics.median(after[1] / before[1] for before, after in pairs)
    ideal = (work["language"] + work["scoring"]) / full["language"]
    return {
        "rounds": len(pairs),
        "layer_mean": work["layer_mean"],
        "milliseconds": 1e3 * statistics.median(rest for _, rest in measured),
        "ratio": ratio,
        "ideal": ideal,
        "over_ideal": ratio / ideal - 1,
        "scoring_gflops": work["scoring"] / 1e9,
        "vision_milliseconds": 1e3 * statistics.median(vision for vision, _ in measured),
        "vision_ratio": statistics.median(after[0] / before[0] for before, after in pairs),
    }


def decoding(model: LlavaForConditionalGeneration, inputs: dict[str, Any], pairs: int) -> dict[str, dict[str, float]]:
    """Time per new token, the identity inside the language model against the plain model, in pairs."""
    methods = (None, Identity(site=AtDecoder(layer=2, keep=1.0)))
    begun = []
    for reducer in methods:
        with attached(model, reducer):
            output = model(**inputs, logits_to_keep=1)
        begun.append((reducer, output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values))
    taken = []
    for turn in range(-2, pairs):
        seconds = {}
        for reducer, token, cache in begun[:: 1 if turn % 2 else -1]:
            with attached(model, reducer):
                start = time.perf_counter()
                for _ in range(DECODED):
                    token = model(input_ids=token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
                seconds[reducer] = (time.perf_counter() - start) / DECODED
            cache.crop(-DECODED)
        if turn >= 0:
            taken.append([seconds[reducer] for reducer in methods])
    ratios = np.array([after / before for before, after in taken])
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {
        "identity, decoder layer 2": {
            "pairs": pairs,
            "plain_milliseconds": 1e3 * float(np.median([before for before, _ in taken])),
            "ratio": float(np.median(ratios)),
            "low": float(low),
            "high": float(high),
        }
    }


def eager(model: LlavaForConditionalGeneration, inputs: dict[str, Any], rounds: int) -> dict[str, float]:
    """The way in which official code obtains its scores: eager attention that returns every layer's map."""
    slow = build(len(model.model.language_model.layers), model.config.text_config.hidden_size, "eager")
    slow.load_state_dict(model.state_dict())
    ratios = []
    for turn in range(rounds + 1):
        times = []
        for each, options in ((model, {}), (slow, {"output_attentions": True})):
            clock = Clock(each)
            with clock.watching():
                each(**inputs, logits_to_keep=1, **options)
            times.append(clock.language)
        if turn:
            ratios.append(times[1] / times[0])
    return {"ratio": statistics.median(ratios)}


def table(result: dict[str, Any]) -> str:
    lines = [
        "| condition | visual tokens, layer mean | ms | of plain | FLOPs-ideal | over ideal | own scoring, GFLOP "
        "| vision tower, of plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for label, row in result["prefill"].items():
        lines.append(
            f"| {label} | {row['layer_mean']:.0f} | {row['milliseconds']:.0f} | {row['ratio']:.3f} "
            f"| {row['ideal']:.3f} | {100 * row['over_ideal']:+.1f} % | {row['scoring_gflops']:.2f} "
            f"| {row['vision_ratio']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--only", nargs="*", help="conditions to time anew, by the beginning of their names; the others keep their rows"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only:
        for label in list(CONDITIONS):
            if not label.startswith(tuple(arguments.only)):
                del CONDITIONS[label]
    model = build(arguments.layers, arguments.width, "sdpa")
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(4, 1024, (TEXT,), generator=generator)
    ids = torch.cat([text[: TEXT // 2], torch.full((576,), 3), text[TEXT // 2 :]])[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 336, 336, generator=generator),
    }
    path = HERE / "result.json"
    before = json.loads(path.read_text()) if arguments.only and path.exists() else {"prefill": {}}
    result: dict[str, Any] = {
        "command": f"python experiments/speed/measure.py --rounds {arguments.rounds}",
        **before,
        "machine": f"{platform.machine()}, {arguments.threads} thread(s), float32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    with torch.no_grad():
        result["decoding"] = decoding(model, inputs, 16 * arguments.rounds)
        if not arguments.only:
            result["eager"] = eager(model, inputs, max(3, arguments.rounds // 2))
        for rows in prefill(model, inputs, arguments.rounds):
            kept = {label: row for label, row in before["prefill"].items() if label not in rows or label == "plain"}
            result["prefill"] = {label: {**rows, **kept}[label] for label in {**before["prefill"], **rows}}
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(json.dumps({name: result[name] for name in ("decoding", "eager")}, indent=1))


if __name__ == "__main__":
    main()
