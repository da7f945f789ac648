"""Scores, costs and times of reducers: the loop over a benchmark, its records, the clock and the statistics."""

from tokenreduce.evaluation.backend import Answer, Backend, MeasuredBackend
from tokenreduce.evaluation.comparison import Comparer
from tokenreduce.evaluation.processes import ProcessError, Processes
from tokenreduce.evaluation.progress import Progress, Silent
from tokenreduce.evaluation.prompts import Prompt
from tokenreduce.evaluation.records import Record, StorageError, read_records
from tokenreduce.evaluation.result import Result, Settings, read_result
from tokenreduce.evaluation.shortcuts import compare, evaluate
from tokenreduce.evaluation.transformers_backend import TransformersBackend

__all__ = [
    "Answer",
    "Backend",
    "Comparer",
    "MeasuredBackend",
    "ProcessError",
    "Processes",
    "Progress",
    "Prompt",
    "Record",
    "Result",
    "Settings",
    "Silent",
    "StorageError",
    "TransformersBackend",
    "compare",
    "evaluate",
    "read_records",
    "read_result",
]
