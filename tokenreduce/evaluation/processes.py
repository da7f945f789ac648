"""One evaluation by several processes, as ``accelerate launch`` starts them: who does what, and how they stay together.

Samples are shared out batch by batch. Every process writes what it answers to a file of its own, and the main one puts
them together (:func:`tokenreduce.evaluation.records.merge`), so that a process that dies costs nothing but its work.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.distributed

Part = TypeVar("Part")

_PATIENCE = timedelta(days=7)
"""The longest wait of one process for the others, who may be timing, or waiting for another job themselves."""


class ProcessError(RuntimeError):
    """Another process of this evaluation failed; the message is its own."""


@dataclass(frozen=True)
class Processes:
    """This process among the ``count`` that share an evaluation: its ``index``, and its ``local_index`` on the
    machine."""

    index: int = 0
    count: int = 1
    local_index: int = 0

    @property
    def main(self) -> bool:
        """True for the one that prints, draws and writes what is written once."""
        return self.index == 0

    def share(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Those that this process does: every ``count``-th, so that all shares take about as long."""
        return parts[self.index :: self.count]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Leave this block when all processes have come to its end. Where one fails, all do: ``ProcessError``.

        What a process does alone, such as the main one's writing, stands in such a block too: the others would
        otherwise wait for one that has failed, or read what is not written yet.
        """
        if self.count == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:  # told to the others below, then raised
            failure = error
        messages = _told_by_all(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for index, message in enumerate(messages):
            if message is not None:
                raise ProcessError(f"process {index} failed: {message}")


@cache
def launched() -> Processes:
    """The processes that ``accelerate launch`` started; this one alone where it did not."""
    if find_spec("accelerate") is None:
        return Processes()
    from accelerate import PartialState  # here, because it is optional
    from accelerate.utils import parse_flag_from_env

    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=on_cpu or not torch.accelerator.is_available(), timeout=_PATIENCE)
    if state.num_processes == 1 and on_cpu and "MASTER_ADDR" in os.environ:
        warnings.warn(
            "`accelerate launch --cpu` starts one process, however many are asked for, unless MPI starts the others; "
            "with --multi_gpu instead of --cpu it starts them all, without a GPU too",
            stacklevel=2,
        )
    return Processes(state.process_index, state.num_processes, state.local_process_index)


def dismiss() -> None:
    """End what :func:`launched` began; without this, torch warns at exit."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _told_by_all(message: str | None) -> list[str | None]:
    messages: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(messages, message)
    return messages
