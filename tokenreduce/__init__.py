"""Visual token reduction for vision-language models: compare methods, and use them."""

from tokenreduce.attach import calibrate, reduce_tokens
from tokenreduce.registry import available, create

__all__ = ["available", "calibrate", "create", "reduce_tokens"]
