"""Scores, costs and times of reducers: the loop over a benchmark, its records, the clock and the statistics."""

from tokenreduce.evaluation.comparison import Comparer, Settings, compare, read_metrics
from tokenreduce.evaluation.processes import ProcessError, Processes
from tokenreduce.evaluation.progress import Progress, Silent
from tokenreduce.evaluation.records import Record, StorageError, read_records
from tokenreduce.evaluation.runner import evaluate

__all__ = [
    "Comparer",
    "ProcessError",
    "Processes",
    "Progress",
    "Record",
    "Settings",
    "Silent",
    "StorageError",
    "compare",
    "evaluate",
    "read_metrics",
    "read_records",
]
