"""A model that was compiled, whose attention kernel was switched, or that is checkpointed, offloaded or wrapped, before
or inside the context: the same result as without, or a refusal that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration as Model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tokenreduce import create, reduce_tokens
from tokenreduce.reducer import AtDecoder, AtEncoder
from tokenreduce.testing import Identity, prompts, tiny_llava

accelerate = pytest.importorskip("accelerate")

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4}
REDUCERS = {
    "keep all at the projector": Identity(),
    "keep all in the tower": Identity(site=AtEncoder(layer=1, where="attention", keep=1.0)),
    "keep all in the decoder": Identity(site=AtDecoder(layer=2, keep=1.0)),
    "fopru_rank": create("fopru_rank", keep=0.5),
    "flowcut": create("flowcut", keep=0.5),
    "visionzip": create("visionzip", keep=0.5),
    "tome": create("tome", keep=0.5),
    "fastv": create("fastv", keep=0.3, layer=1),
    "fastv, compact": create("fastv", keep=0.3, layer=2, positions="compact"),
    "pyramiddrop": create("pyramiddrop"),
    "dart": create("dart", keep=0.5, layer=1),
    "sparsevlm": create("sparsevlm", layers=(0, 1), keeps=(0.6, 0.3)),
    "vtw": create("vtw"),
    "chain": create("chain", reducers=({"name": "fopru_rank", "keep": 0.5}, {"name": "fastv", "keep": 0.5})),
}
FEW = ["fopru_rank", "visionzip", "tome", "fastv", "pyramiddrop", "vtw"]
Change = Callable[[Any], None]


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    """Compiled code of one test is not there in the next."""
    yield
    torch._dynamo.reset()


@contextmanager
def changed_inside(model: Any, name: str, change: Change, when: str) -> Iterator[Any]:
    """A context with a reducer, and the model changed before it or in it."""
    if when == "before":
        change(model)
    with reduce_tokens(model, REDUCERS[name]) as attachment:
        if when == "inside":
            change(model)
        yield attachment


def _check(name: str, change: Change, when: str, word: str, call: Callable[[Any, dict[str, Tensor]], Tensor]) -> None:
    """What a call gives and what is noted of it inside, and what it gives afterwards, are as without the change, or
    ``word`` is why not."""
    model = tiny_llava()
    inputs = prompts(model, [1, 2])
    plain = call(model, inputs)
    with reduce_tokens(model, REDUCERS[name]) as attachment:
        expected = call(model, inputs)
        samples = attachment.samples
    try:
        with changed_inside(model, name, change, when) as attachment:
            found = call(model, inputs)
            noted = attachment.samples
    except ValueError as refused:
        assert word in str(refused).lower()
    else:
        assert torch.equal(found, expected)
        assert noted == samples
    assert torch.equal(call(model, inputs), plain)


def _logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def _answers(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.generate(**inputs, **GREEDY)


# Compiled.

Parts = Callable[[Any], list[nn.Module]]
PARTS: dict[str, tuple[Parts, list[str]]] = {
    "a decoder layer": (lambda model: [model.model.language_model.layers[2]], ["fastv", "pyramiddrop", "vtw"]),
    "the first decoder layer": (lambda model: [model.model.language_model.layers[0]], ["fastv", "vtw", "chain"]),
    "the language model": (lambda model: [model.model.language_model], ["fastv", "vtw", "fopru_rank"]),
    "a tower layer": (lambda model: [model.model.vision_tower.encoder.layers[1]], ["fopru_rank", "tome", "flowcut"]),
    "the tower": (lambda model: [model.model.vision_tower], ["fopru_rank", "tome", "visionzip"]),
    "the projector": (lambda model: [model.model.multi_modal_projector], ["visionzip", "fopru_rank", "tome"]),
    "an attention": (lambda model: [model.model.language_model.layers[0].self_attn], ["fastv", "sparsevlm"]),
    "a tower's attention": (
        lambda model: [layer.self_attn for layer in model.model.vision_tower.encoder.layers],
        ["fopru_rank", "tome"],
    ),
    "feed-forward networks": (
        lambda model: [layer.mlp for layer in model.model.language_model.layers],
        ["fastv", "fopru_rank"],
    ),
    "a tower's feed-forward networks": (
        lambda model: [layer.mlp for layer in model.model.vision_tower.encoder.layers],
        ["tome", "visionzip"],
    ),
    "the model": (lambda model: [model], ["fopru_rank", "tome", "fastv"]),
    "the model within": (lambda model: [model.model], ["fopru_rank", "tome", "fastv"]),
}
CASES = [(part, name) for part, (_, names) in PARTS.items() for name in names]


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize(("part", "name"), CASES)
def test_compiled(name: str, part: str, when: str) -> None:
    modules, _ = PARTS[part]

    def compiled(model: Any) -> None:
        for module in modules(model):
            module.compile(backend="eager")
        if when == "before":  # traced, without any hook
            _logits(model, prompts(model, [1, 2]))

    _check(name, compiled, when, "compil", _logits)


@pytest.mark.parametrize("name", ["fastv", "vtw"])
def test_what_was_traced_inside_does_not_run_afterwards(name: str) -> None:
    """Not in the plain model, and not in the context of another reducer."""
    model = tiny_llava()
    inputs = prompts(model, [1])
    plain = _logits(model, inputs)
    with reduce_tokens(model, "vtw", layer=1):
        expected = _logits(model, inputs)
    try:
        with reduce_tokens(model, REDUCERS[name]):
            model.model.language_model.layers[2].compile(backend="eager")
            _logits(model, inputs)
    except ValueError as refused:
        assert "compil" in str(refused).lower()
    assert torch.equal(_logits(model, inputs), plain)
    try:
        with reduce_tokens(model, "vtw", layer=1):
            assert torch.equal(_logits(model, inputs), expected)
    except ValueError as refused:
        assert "compil" in str(refused).lower()


# Another attention kernel.

KERNELS: dict[str, Any] = {
    "all": "eager",
    "the language model's": {"text_config": "eager"},
    "the tower's": {"vision_config": "eager"},
}


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("name", REDUCERS)
def test_another_kernel(name: str, which: str, when: str) -> None:
    reference, model = tiny_llava(), tiny_llava()
    inputs = prompts(model, [1, 2])
    reference.set_attn_implementation(KERNELS[which])
    plain = reference.generate(**inputs, **GREEDY)
    with reduce_tokens(reference, REDUCERS[name]) as attachment:
        expected, samples = reference.generate(**inputs, **GREEDY), attachment.samples
    kernels = {kernel: ALL_ATTENTION_FUNCTIONS[kernel] for kernel in ("sdpa", "flash_attention_2")}
    try:
        with changed_inside(model, name, lambda each: each.set_attn_implementation(KERNELS[which]), when) as attachment:
            assert torch.equal(model.generate(**inputs, **GREEDY), expected)
            assert attachment.samples == samples
    except ValueError as refused:
        assert "attention" in str(refused)
    assert {kernel: ALL_ATTENTION_FUNCTIONS[kernel] for kernel in kernels} == kernels
    assert "eager" not in ALL_ATTENTION_FUNCTIONS
    model.set_attn_implementation(KERNELS[which])
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)


@pytest.mark.parametrize("name", ["fopru_rank", "visionzip", "fastv", "pyramiddrop"])
def test_a_kernel_switched_to_and_fro_inside(name: str) -> None:
    model = tiny_llava()
    inputs = prompts(model, [1, 2])
    with reduce_tokens(model, REDUCERS[name]):
        expected = model.generate(**inputs, **GREEDY)
        try:
            for kernel in ("eager", "sdpa"):
                model.set_attn_implementation(kernel)
                answers = model.generate(**inputs, **GREEDY)
        except ValueError as refused:
            assert "attention" in str(refused)
            return
        assert torch.equal(answers, expected)


def test_block_masks_are_refused_inside_too(llava: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*args: Any, **options: Any) -> Any:
        raise AssertionError("a layer was computed with block masks")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", kernel)
    with reduce_tokens(llava, "vtw"), pytest.raises(ValueError, match="flex_attention"):
        monkeypatch.setattr(llava.model.language_model.config, "_attn_implementation_internal", "flex_attention")
        llava.generate(**prompts(llava, [1]), **GREEDY)


# Gradients.


@pytest.mark.parametrize("name", [name for name in REDUCERS if name.startswith("keep all")])
def test_gradients_of_keeping_all_are_the_plain_models(name: str) -> None:
    model = tiny_llava().train()
    inputs = prompts(model, [1, 2])
    expected = _gradients(model, inputs)
    with reduce_tokens(model, REDUCERS[name]):
        found = _gradients(model, inputs)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", REDUCERS)
def test_gradients_are_the_derivative(name: str) -> None:
    """Along the gradient, against a difference quotient, which single precision bounds."""
    model = tiny_llava().train()
    inputs = prompts(model, [1, 2])
    with reduce_tokens(model, REDUCERS[name]), torch.no_grad():
        with torch.enable_grad():
            gradients = _gradients(model, inputs)
        length = sum(value.square().sum() for value in gradients.values()) ** 0.5
        values = []
        for step in (1e-3, -1e-3):
            for key, parameter in model.named_parameters():
                parameter.add_(step / length * gradients[key])
            values.append(_loss(model, inputs))
            for key, parameter in model.named_parameters():
                parameter.sub_(step / length * gradients[key])
    torch.testing.assert_close((values[0] - values[1]) / 2e-3, length, rtol=2e-2, atol=0)


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", REDUCERS)
def test_gradient_checkpointing(name: str, reentrant: bool, when: str) -> None:
    model = tiny_llava().train()
    inputs = prompts(model, [1, 2])
    with reduce_tokens(model, REDUCERS[name]) as attachment:
        expected, samples = _gradients(model, inputs), attachment.samples

    def checkpointed(each: Any) -> None:
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})

    try:
        with changed_inside(model, name, checkpointed, when) as attachment:
            found = _gradients(model, inputs)
            assert attachment.samples == samples
    except ValueError as refused:
        assert "checkpoint" in str(refused)
        return
    assert all(value.abs().max() > 0 for key, value in expected.items() if "q_proj.weight" in key and "layers.0" in key)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["tome", "visionzip", "fopru_rank", "fastv"])
def test_gradients_asked_for_after_the_context(name: str) -> None:
    """The backward pass may come when the model is plain again."""
    model = tiny_llava().train()
    inputs = prompts(model, [1, 2])
    with reduce_tokens(model, REDUCERS[name]):
        expected = _gradients(model, inputs)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        try:
            with reduce_tokens(model, REDUCERS[name]):
                loss = _loss(model, inputs)
            loss.backward()
        except ValueError as refused:
            assert "checkpoint" in str(refused)
            continue
        for key, value in _collected(model).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)


def _loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits[:, -1].logsumexp(-1).sum()


def _gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    _loss(model, inputs).backward()
    return _collected(model)


def _collected(model: Any) -> dict[str, Tensor]:
    return {
        key: torch.zeros_like(each) if each.grad is None else each.grad.clone()
        for key, each in model.named_parameters()
    }


# Offloaded.


def _dispatched(*parts: str) -> Callable[[Any, str], None]:
    def change(model: Any, folder: str) -> None:
        names = ["model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"]
        places = {name: "disk" if name in parts else "cpu" for name in names}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)

    return change


OFFLOADED: dict[str, Callable[[Any, str], Any]] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, execution_device="cpu"),
    "the tower on disk": _dispatched("model.vision_tower"),
    "the projector on disk": _dispatched("model.multi_modal_projector"),
    "the language model on disk": _dispatched("model.language_model", "lm_head"),
    "the tower offloaded": lambda model, folder: accelerate.cpu_offload(
        model.model.vision_tower, execution_device="cpu"
    ),
    "the language model offloaded": lambda model, folder: accelerate.cpu_offload(
        model.model.language_model, execution_device="cpu"
    ),
}


@pytest.mark.parametrize("when", ["before", "inside"])
@pytest.mark.parametrize("how", OFFLOADED)
@pytest.mark.parametrize("name", [*FEW, "dart", "sparsevlm", "chain"])
def test_offloaded(name: str, how: str, when: str, tmp_path: Path) -> None:
    _check(name, lambda model: OFFLOADED[how](model, str(tmp_path)), when, "offload", _answers)


@pytest.mark.parametrize("name", ["fopru_rank", "tome", "fastv"])
def test_hooks_of_accelerate_can_be_taken_out_afterwards(name: str, tmp_path: Path) -> None:
    model = tiny_llava()
    inputs = prompts(model, [1])
    plain = model.generate(**inputs, **GREEDY)
    accelerate.cpu_offload(model, execution_device="cpu")
    with reduce_tokens(model, REDUCERS[name]):
        pass
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)


# Wrapped.


class Adapted(nn.Module):
    """What an adapter library puts around a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> Any:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)


class Parallel(nn.Module):
    """As ``DataParallel`` holds a model."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


WRAPPERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "adapter": (Adapted, "get_base_model"),
    "compiled": (lambda model: torch.compile(model, backend="eager"), "_orig_mod"),
    "parallel": (Parallel, "module"),
    "DataParallel": (nn.DataParallel, "module"),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("name", ["fopru_rank", "tome", "fastv"])
def test_a_wrapper_works_or_names_what_to_pass(name: str, kind: str) -> None:
    wrap, inside = WRAPPERS[kind]
    model = tiny_llava()
    inputs = prompts(model, [1])
    plain = model(**inputs).logits
    with reduce_tokens(model, REDUCERS[name]):
        expected = model(**inputs).logits
    wrapped = wrap(model)
    try:
        with reduce_tokens(wrapped, REDUCERS[name]):
            found = wrapped(**inputs).logits
    except (TypeError, ValueError) as refused:
        assert inside in str(refused)
    else:
        assert torch.equal(found, expected)
        assert torch.equal(wrapped(**inputs).logits, plain)


@pytest.mark.parametrize("kind", ["adapter", "parallel", "DataParallel"])
@pytest.mark.parametrize("name", ["fopru_rank", "tome", "fastv"])
def test_a_model_that_is_wrapped_is_reduced_in_its_wrapper(name: str, kind: str) -> None:
    """The remedy: pass what is inside, and call the wrapper."""
    model = tiny_llava()
    inputs = prompts(model, [1])
    plain = model(**inputs).logits
    wrapped = WRAPPERS[kind][0](model)
    with reduce_tokens(model, REDUCERS[name]):
        expected = model(**inputs).logits
        assert torch.equal(wrapped(**inputs).logits, expected)
    assert torch.equal(wrapped(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, r"model.*\bNone\b"),
        (Model, "model.*instance"),
        ("llava-hf/llava-1.5-7b-hf", "model.*str"),
        (3, "model.*int"),
        (nn.Linear(2, 2), "model.*Linear"),
    ],
    ids=["None", "class", "path", "number", "layer"],
)
def test_what_is_no_model_is_refused_clearly(model: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message), reduce_tokens(model, "fopru_rank"):
        pass


@pytest.mark.parametrize("reducer", [None, 0.5, int], ids=["None", "0.5", "another class"])
def test_what_is_no_reducer_is_refused_clearly(llava: Model, reducer: Any) -> None:
    refused: AbstractContextManager[Any] = pytest.raises((TypeError, ValueError), match="reducer")
    with refused, reduce_tokens(llava, reducer):
        pass
    assert "forward" not in vars(llava)


def test_a_class_stands_for_its_defaults(llava: Model) -> None:
    with reduce_tokens(llava, type(create("fastv")), keep=0.25) as attachment:
        assert attachment.reducer == create("fastv", keep=0.25)


def test_a_preset_by_its_name(llava: Model) -> None:
    assert create("fastv_k2_r50") == create("fastv", layer=2, keep=0.5)
    with reduce_tokens(llava, "fastv_k2_r50", keep=0.25) as attachment:
        assert attachment.reducer == create("fastv", layer=2, keep=0.25)
