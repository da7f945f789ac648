"""One command that checks a GPU: does reduced precision choose the same tokens, and how much faster is every method?

The model has LLaVA-1.5-7B's shape and random weights. Selections and logits in bfloat16, with SDPA and with
FlashAttention 2 where it is installed, are held against float32 with four decoder layers; times
are to the first token and interleaved with the plain model's, at batch 1 and 16.

    python experiments/gpu/check.py
    python experiments/gpu/check.py --device cpu --shape small --rounds 2     # a rehearsal without a GPU
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.utils import is_flash_attn_2_available

from tokenreduce import available, create, reduce_tokens
from tokenreduce.catalog.description import LLAVA, knobs
from tokenreduce.evaluation.clock import PARTS, attached, peak_memory, seconds_by_part
from tokenreduce.evaluation.costs import prefill_cost
from tokenreduce.evaluation.roofline import limits, roofline
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import REDUCERS
from tokenreduce.testing.models import draw_weights

HERE = Path(__file__).parent
TEXT = 64
PLAIN = "none"
LEFT_OUT = {"chain", "no_image"}
"""No method by itself; one that leaves nothing to compare."""

SHAPES: dict[str, dict[str, dict[str, int]]] = {
    "7b": {
        "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
        "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    },
    "small": {
        "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    },
}


def build(
    shape: str, device: str, dtype: torch.dtype, attention: str, layers: int | None = None
) -> LlavaForConditionalGeneration:
    """CLIP ViT-L/14-336 and a Llama, or a small pair of the same kinds; ``layers`` cuts the Llama's depth."""
    vision, text = SHAPES[shape]["vision"], dict(SHAPES[shape]["text"])
    image_size = 336 if shape == "7b" else 112
    text["num_hidden_layers"] = layers or text["num_hidden_layers"]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=image_size, patch_size=14),
        text_config=LlamaConfig(**text, num_key_value_heads=text["num_attention_heads"], vocab_size=32064),
        image_token_id=3,
        image_seq_length=(image_size // 14) ** 2,
    )
    config._attn_implementation = attention
    config.dtype = dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None  # an answer must not end before it was timed
    return model


def prompts(model: LlavaForConditionalGeneration, rows: int) -> dict[str, Tensor]:
    """``rows`` prompts of the same length with a picture of noise each."""
    generator = torch.Generator().manual_seed(1)
    size, tokens = model.config.vision_config.image_size, model.config.image_seq_length
    text = torch.randint(4, 32000, (rows, TEXT), generator=generator)
    ids = torch.cat([text[:, : TEXT // 2], torch.full((rows, tokens), 3), text[:, TEXT // 2 :]], dim=1)
    pixels = torch.randn(rows, 3, size, size, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in inputs.items()}


def methods() -> list[str]:
    """All that have a default for every knob, and read no text before the language model, for which these models have
    no tokenizer and no text tower."""
    names = [name for name in available("reducers") if name not in LEFT_OUT | {PLAIN}]
    names = [name for name in names if all(knob.default is not None for knob in knobs(REDUCERS.get(name)))]
    return [PLAIN, *(name for name in names if not _reads(create(name)))]


def _reads(reducer: TokenReducer) -> bool:
    steps = [step for step in reducer.steps(LLAVA) if step.decoder_layer(LLAVA) is None]
    return any(signal.text for step in steps for signal in step.sees)


def kernels() -> list[str]:
    return ["sdpa", *(["flash_attention_2"] if is_flash_attn_2_available() and torch.cuda.is_available() else [])]


def parity(shape: str, device: str) -> dict[str, dict[str, dict[str, float]]]:
    """For every kernel in bfloat16 and every method: the share of the tokens kept in float32 that is kept too, and how
    far the logits are from float32's, in units of how far the plain model's are."""
    layers = min(4, SHAPES[shape]["text"]["num_hidden_layers"])
    model = build(shape, device, torch.float32, "sdpa", layers)
    draw_weights(model, seed=0)
    inputs = prompts(model, 2)
    reference = {name: choices(model, name, inputs) for name in methods()}
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    del model
    result: dict[str, dict[str, dict[str, float]]] = {}
    for kernel in kernels():
        model = build(shape, device, torch.bfloat16, kernel, layers)
        model.load_state_dict(weights)
        rows = {}
        for name, (kept, logits) in reference.items():
            found, reduced = choices(model, name, prompts(model, 2))
            same = statistics.mean(len(a & b) / max(1, len(a)) for a, b in zip(kept, found, strict=True))
            rows[name] = {"same_tokens": same, "logits": float((reduced - logits).abs().max())}
        plain = rows[PLAIN]["logits"] or 1.0
        result[kernel] = {name: {**row, "logits": row["logits"] / plain} for name, row in rows.items()}
        del model
    return result


def choices(
    model: LlavaForConditionalGeneration, name: str, inputs: dict[str, Tensor]
) -> tuple[list[set[int]], Tensor]:
    """The tokens that a method keeps of every prompt's picture, and the logits of the first new token."""
    with torch.inference_mode(), reduce_tokens(model, create(name)) as attachment:
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return [set(sample.images[0].kept) for sample in attachment.samples], logits


def speed(shape: str, device: str, dtype: torch.dtype, batches: list[int], rounds: int) -> Iterator[dict[str, Any]]:
    """A row for every kernel, batch size and method."""
    for kernel in kernels():
        model = build(shape, device, dtype, kernel)
        for batch in batches:
            inputs = prompts(model, batch)
            seconds: dict[str, list[dict[str, float]]] = {name: [] for name in methods()}
            for turn in range(-2, rounds):
                for name in seconds:
                    with torch.inference_mode(), attached(model, None if name == PLAIN else create(name)):
                        taken = seconds_by_part(model, inputs)
                    if turn >= 0:
                        seconds[name].append(dict(taken))
            yield from _rows(model, kernel, batch, inputs, seconds)
        del model


def _rows(
    model: LlavaForConditionalGeneration,
    kernel: str,
    batch: int,
    inputs: dict[str, Tensor],
    seconds: dict[str, list[dict[str, float]]],
) -> Iterator[dict[str, Any]]:
    whole = [sum(turn[part] for part in PARTS if part in turn) for turn in seconds[PLAIN]]
    work: dict[str, float] = {}
    for name, turns in seconds.items():
        first = [sum(turn[part] for part in PARTS if part in turn) for turn in turns]
        with torch.inference_mode(), reduce_tokens(model, create(name)) as attachment:
            model(**inputs, logits_to_keep=1)
            costs = prefill_cost(model, attachment.samples)
            peak = peak_memory(model.device, lambda: model(**inputs, logits_to_keep=1))
        language = sum(cost.llm_flops for cost in costs)
        work[name] = language + sum(cost.vision_flops for cost in costs)
        bound = roofline(model, language, sum(cost.kv_bytes for cost in costs))
        yield {
            "kernel": kernel,
            "batch": batch,
            "method": name,
            "layer_mean": costs[0].layer_mean,
            "milliseconds": 1e3 * statistics.median(first),
            "parts": {part: 1e3 * statistics.median(turn.get(part, 0.0) for turn in turns) for part in PARTS},
            "ratio": statistics.median(after / before for before, after in zip(whole, first, strict=True)),
            "ideal": work[name] / work[PLAIN],
            "decode_milliseconds": 1e3 * statistics.median(turn["decoding"] for turn in turns) / 8,
            "peak_bytes": peak,
            "memory_bound": bound.prefill.memory_bound,
        }


def tables(result: dict[str, Any]) -> str:
    lines = ["| kernel | method | tokens kept as in float32 | logits off, of the plain model's |", "|---|---|---|---|"]
    for kernel, rows in result["parity"].items():
        for name, row in rows.items():
            lines.append(f"| {kernel} | {name} | {100 * row['same_tokens']:.1f} % | {row['logits']:.2f} |")
    lines += [
        "",
        "| kernel | batch | method | tokens, layer mean | first token, ms | vision / selection / LLM | of plain "
        "| FLOPs-ideal | ms a token | peak, GB | memory-bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["speed"]:
        parts = " / ".join(f"{row['parts'][part]:.1f}" for part in PARTS)
        peak = "n/a" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
        lines.append(
            f"| {row['kernel']} | {row['batch']} | {row['method']} | {row['layer_mean']:.0f} "
            f"| {row['milliseconds']:.1f} | {parts} | {row['ratio']:.3f} | {row['ideal']:.3f} "
            f"| {row['decode_milliseconds']:.1f} | {peak} | {'yes' if row['memory_bound'] else 'no'} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--output", type=Path, default=HERE / "result.json")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu --shape small rehearses without one")
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    hardware = torch.cuda.get_device_name() if given.device == "cuda" else platform.machine()
    result: dict[str, Any] = {
        "command": "python experiments/gpu/check.py",
        "hardware": hardware,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "shape": given.shape,
        "dtype": str(dtype).removeprefix("torch."),
    }
    print(f"{hardware}: parity", flush=True)
    result["parity"] = parity(given.shape, given.device)
    machine = limits(build("small", given.device, dtype, "sdpa"))
    result["machine"] = {"flops": machine.flops, "bytes": machine.bytes}
    result["speed"] = []
    for row in speed(given.shape, given.device, dtype, given.batches, given.rounds):
        result["speed"].append(row)
        print(f"{row['kernel']}, batch {row['batch']}: {row['method']} {row['ratio']:.3f}", flush=True)
        given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(tables(result))


if __name__ == "__main__":
    main()
