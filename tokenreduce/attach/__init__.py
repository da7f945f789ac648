"""Puts a reducer into a live model and takes it out again."""

from tokenreduce.attach.attachment import Attachment, ImageReduction, SampleReduction, StepReduction, reduce_tokens

__all__ = ["Attachment", "ImageReduction", "SampleReduction", "StepReduction", "reduce_tokens"]
