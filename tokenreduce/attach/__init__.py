"""Puts a reducer into a live model and takes it out again."""

from tokenreduce.attach.attachment import Attachment, SampleReduction, reduce_tokens
from tokenreduce.attach.calibration import calibrate
from tokenreduce.attach.vision import ImageReduction, StepReduction

__all__ = ["Attachment", "ImageReduction", "SampleReduction", "StepReduction", "calibrate", "reduce_tokens"]
