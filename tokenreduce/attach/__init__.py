"""Puts a reducer into a live model and takes it out again."""

from tokenreduce.attach.attachment import Attachment, reduce_tokens
from tokenreduce.attach.calibration import calibrate
from tokenreduce.passage import ImageReduction, SampleReduction, StepReduction

__all__ = ["Attachment", "ImageReduction", "SampleReduction", "StepReduction", "calibrate", "reduce_tokens"]
