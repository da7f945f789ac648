"""Whether a plugin behaves: the checks of :mod:`tokenreduce.testing` on it, one finding after the other."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedModel

from tokenreduce.attach import reduce_tokens
from tokenreduce.benchmarks.benchmark import Benchmark
from tokenreduce.catalog.description import knobs
from tokenreduce.models.loading import load
from tokenreduce.reducer import TokenReducer
from tokenreduce.registry import BENCHMARKS, REDUCERS, Registry
from tokenreduce.testing import BENCHMARK_INVARIANTS, INVARIANTS, InvariantError, prompts, tiny_llava

PASSED, REFUSED, FAILED = "passed", "refused", "FAILED"

BATCHES = ((1,), (1, 3, 0))
"""How many images the prompts of a batch have."""
SAMPLES = 20
"""How many of a benchmark's samples are looked at."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; ``detail`` says why it is not plainly a pass."""

    what: str
    outcome: str
    detail: str = ""


def findings(registry: Registry[Any], name: str, settings: dict[str, Any], model: str | None) -> Iterator[Finding]:
    """Check the plugin ``name`` with these settings, on a checkpoint or, without one, on small random
    models.

    Raises ``ValueError`` where there is nothing to check: a knob or checkpoint that cannot be used.
    """
    if registry is REDUCERS:
        yield from _reducer(REDUCERS.create(name, **settings), model)
    elif registry is BENCHMARKS:
        yield from _benchmark(BENCHMARKS.create(name, **settings))
    else:
        raise ValueError(f"{name!r} is a model family: give a checkpoint that it serves, --model DIRECTORY")


def _reducer(reducer: TokenReducer, checkpoint: str | None) -> Iterator[Finding]:
    yield from _as_a_plugin(reducer, reducer.knobs(), REDUCERS)
    refused = 0
    models = _models(checkpoint)
    for label, make in models.items():
        model = make()
        try:
            with reduce_tokens(model, reducer):
                pass
        except ValueError as error:
            refused += 1
            yield Finding(f"works on {label}", REFUSED if refused < len(models) else FAILED, str(error))
            continue
        for invariant, check in INVARIANTS.items():
            what = f"{invariant.replace('_', ' ')}, on {label}"
            yield _finding(what, partial(_on_batches, check, reducer, model))


def _benchmark(benchmark: Benchmark) -> Iterator[Finding]:
    settings = {knob.name: getattr(benchmark, knob.name) for knob in knobs(type(benchmark))}
    yield from _as_a_plugin(benchmark, settings, BENCHMARKS)
    for invariant, check in BENCHMARK_INVARIANTS.items():
        yield _finding(invariant.replace("_", " "), partial(check, benchmark, SAMPLES))


def _on_batches(check: Callable[..., None], reducer: TokenReducer, model: PreTrainedModel) -> None:
    for images in BATCHES:
        check(reducer, model, prompts(model, images))


def _models(checkpoint: str | None) -> dict[str, Callable[[], PreTrainedModel]]:
    if checkpoint is not None:
        return {checkpoint: lambda: load(checkpoint)[0]}
    return {
        "a model with a class token": tiny_llava,
        "a model without a class token and with grouped keys": lambda: tiny_llava(tower="siglip", key_heads=2),
    }


def _as_a_plugin(instance: Any, settings: dict[str, Any], registry: Registry[Any]) -> Iterator[Finding]:
    def described() -> None:
        cls = type(instance)
        if not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}("):  # the latter is a dataclass's own doing
            raise InvariantError("the class has no docstring; its first line is what tables say about it")

    def configured() -> None:
        plain: Any = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(settings))))
        again = registry.create(registry.name_of(instance), **plain)
        if again != instance:
            raise InvariantError(f"made from its own settings it is {again}")

    def sent() -> None:
        if pickle.loads(pickle.dumps(instance)) != instance:
            raise InvariantError("what arrives is not equal to what was sent")

    yield _finding("is described", described)
    yield _finding("can be written into a configuration file and read back", configured)
    yield _finding("can be sent to another process", sent)


def _finding(what: str, check: Callable[[], object]) -> Finding:
    try:
        check()
    except InvariantError as error:
        return Finding(what, FAILED, str(error))
    except Exception as error:  # the plugin's own code may raise anything
        return Finding(what, FAILED, f"{type(error).__name__}: {error}")
    return Finding(what, PASSED)
