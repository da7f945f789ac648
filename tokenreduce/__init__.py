"""Visual token reduction for vision-language models: compare methods, and use them."""

from tokenreduce.attach import reduce_tokens
from tokenreduce.registry import available, create

__all__ = ["available", "create", "reduce_tokens"]
