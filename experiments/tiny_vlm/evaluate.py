"""Score a checkpoint on the scenes: whole, without the image, and with a random quarter of the visual tokens.

    python experiments/tiny_vlm/evaluate.py tokenreduce/assets/tiny_vlm

Loads the checkpoint as a user would and generates every answer from a single question.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenreduce.benchmarks.benchmark import Sample
from tokenreduce.benchmarks.scenes import CATEGORIES, Scenes


def prompt(processor: Any, question: str, image: bool = True) -> str:
    content = [{"type": "image"}] * image + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def keep_at_random(
    inputs: dict[str, Tensor], features: Tensor, image_token: int, keep: float, seed: int
) -> dict[str, Any]:
    """Inputs of `generate` with a random share of each prompt's visual tokens, positions closed up."""
    generator = torch.Generator().manual_seed(seed)
    rows, kept_features = [], []
    for ids, mask, feature in zip(inputs["input_ids"], inputs["attention_mask"], features, strict=True):
        count = round(keep * len(feature))
        kept = torch.randperm(len(feature), generator=generator)[:count].sort().values
        stays = ids != image_token
        stays[(ids == image_token).nonzero()[kept]] = True
        rows.append((ids[stays], mask[stays]))
        kept_features.append(feature[kept])
    attention = torch.stack([mask for _, mask in rows])
    return {
        "input_ids": torch.stack([ids for ids, _ in rows]),
        "attention_mask": attention,
        "position_ids": (attention.cumsum(-1) - 1).clamp(min=0),
        "pooled": kept_features,
    }


@torch.no_grad()
def answers(
    model: Any, processor: Any, benchmark: Scenes, samples: list[Sample], keep: float, image: bool, seed: int
) -> list[str]:
    texts = [prompt(processor, sample.question, image) for sample in samples]
    pictures = [benchmark.images(sample)[0] for sample in samples] if image else None
    inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    if keep < 1:
        encoded = model.base_model.get_image_features(pixel_values=inputs["pixel_values"], return_dict=True)
        features = torch.stack(list(encoded.pooler_output))
        reduced = keep_at_random(inputs, features, model.config.image_token_id, keep, seed)
        encoded.pooler_output = reduced.pop("pooled")
        length = reduced["input_ids"].shape[1]
        output = model.generate(**reduced, mm_encoder_outputs={"image": encoded})
    else:
        output = model.generate(**inputs)
    return processor.batch_decode(output[:, length:], skip_special_tokens=True)


def evaluate(
    model: Any, processor: Any, benchmark: Scenes, keep: float = 1.0, image: bool = True, batch: int = 50
) -> dict[str, float]:
    """Mean score over all samples and in every category."""
    scores: dict[str, list[float]] = defaultdict(list)
    for first in range(0, len(benchmark), batch):
        samples = [benchmark[i] for i in range(first, min(first + batch, len(benchmark)))]
        given = answers(model, processor, benchmark, samples, keep, image, seed=first)
        for sample, answer in zip(samples, given, strict=True):
            score = benchmark.score(answer, sample)
            scores["all"].append(score)
            scores[sample.category].append(score)
    return {name: round(sum(scores[name]) / len(scores[name]), 4) for name in ("all", *CATEGORIES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=250, help="scenes, five questions each")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    parser.add_argument("--json", type=Path, help="write the results to this file too")
    options = parser.parse_args()
    processor = AutoProcessor.from_pretrained(options.checkpoint, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint).float().eval()
    benchmark = Scenes(count=options.count, seed=options.seed)
    results = {
        "unreduced": evaluate(model, processor, benchmark),
        "without image": evaluate(model, processor, benchmark, image=False),
        **{f"random {keep:.0%}": evaluate(model, processor, benchmark, keep=keep) for keep in (0.5, 0.25, 0.11)},
    }
    print("| | " + " | ".join(results["unreduced"]) + " |")
    print("|---" * (len(CATEGORIES) + 2) + "|")
    for name, scores in results.items():
        print(f"| {name} | " + " | ".join(f"{100 * score:.1f}" for score in scores.values()) + " |")
    if options.json:
        settings = {"scenes": options.count, "seed": options.seed, "questions": len(benchmark)}
        options.json.write_text(json.dumps({"benchmark": settings, "scores": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
