"""FLOPs of transformer layers. A FLOP is one multiplication or one addition.

Attention in a decoder is counted ``causal`` (the triangle, or the band of a sliding window, that must be computed)
unless the square is asked for (what a kernel without causal skipping computes, and what most papers count); in a vision
encoder it is always square. Norms, activations, rotary embeddings and the softmax are left out, as everywhere in the
field.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from transformers import PretrainedConfig


def decoder_flops(lengths: Sequence[int], config: PretrainedConfig, causal: bool = True) -> float:
    """A prefill: every decoder layer on the number of tokens that it sees, and the output layer at the last position.

    Queries may share keys (grouped-query attention); the feed-forward network is gated, so it has three matrices.
    """
    kinds = Counter(zip(lengths, _windows(config, len(lengths)), strict=True))
    layers = sum(
        count * decoder_layer_flops(tokens, config, causal, window) for (tokens, window), count in kinds.items()
    )
    return layers + 2 * config.hidden_size * config.vocab_size


def decoder_layer_flops(tokens: int, config: PretrainedConfig, causal: bool = True, window: int | None = None) -> float:
    """One decoder layer with a gated feed-forward network on ``tokens`` tokens.

    ``window`` is how many tokens each one sees, itself included, where that is less than all before it.
    """
    width, query_width = config.hidden_size, config.num_attention_heads * head_dim(config)
    seen = min(tokens, window or tokens)
    pairs = seen * (seen + 1) / 2 + (tokens - seen) * seen if causal else tokens**2
    projections = 2 * tokens * width * (2 * query_width + 2 * key_width(config))
    return projections + 4 * pairs * query_width + 6 * tokens * width * config.intermediate_size


def encoder_layer_flops(tokens: int, config: PretrainedConfig) -> float:
    """One vision-transformer layer with a two-matrix feed-forward network on ``tokens`` tokens."""
    width = config.hidden_size
    return 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * config.intermediate_size


def paper_flops(lengths: Sequence[int], config: PretrainedConfig, feed_forward_matrices: int = 2) -> float:
    """The formula of the field's papers, ``4nd^2 + 2n^2d + 2ndm`` a layer, a multiply-add counted once.

    FastV, VisionZip, SparseVLM and DivPrune count two feed-forward matrices; PyramidDrop, DART and CDPruner count
    three. Papers leave the text out of ``lengths``, which makes ratios look smaller than they are.
    """
    width, inner = config.hidden_size, config.intermediate_size
    return sum(4 * n * width**2 + 2 * n**2 * width + feed_forward_matrices * n * width * inner for n in lengths)


def head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_width(config: PretrainedConfig) -> int:
    return config.num_key_value_heads * head_dim(config)


def _windows(config: PretrainedConfig, layers: int) -> Sequence[int | None]:
    """Every layer's sliding window, None where there is none."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
