"""What every reducer and every benchmark must keep to, as checks that plugin authors can run on their own."""

from tokenreduce.testing.benchmarks import BENCHMARK_INVARIANTS, check_benchmark
from tokenreduce.testing.invariants import INVARIANTS, Identity, InvariantError, check_reducer
from tokenreduce.testing.made_up import MadeUp
from tokenreduce.testing.models import prompts, tiny_llava
from tokenreduce.testing.tokens import visual_tokens

__all__ = [
    "BENCHMARK_INVARIANTS",
    "INVARIANTS",
    "Identity",
    "InvariantError",
    "MadeUp",
    "check_benchmark",
    "check_reducer",
    "prompts",
    "tiny_llava",
    "visual_tokens",
]
