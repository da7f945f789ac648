"""What every reducer must keep to, as checks that plugin authors can run on their own."""

from tokenreduce.testing.invariants import INVARIANTS, Identity, InvariantError, check_reducer
from tokenreduce.testing.models import prompts, tiny_llava

__all__ = ["INVARIANTS", "Identity", "InvariantError", "check_reducer", "prompts", "tiny_llava"]
