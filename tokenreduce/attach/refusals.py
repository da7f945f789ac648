"""What an attached model cannot do, refused by name before it goes wrong without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tokenreduce.attach import caches, masks
from tokenreduce.attach.call import Call
from tokenreduce.attach.decoder import DecoderSite
from tokenreduce.attach.generation import refuse_chunks, setting
from tokenreduce.models.stack import cache_of

if TYPE_CHECKING:
    from tokenreduce.attach.attachment import Attachment


def standing(attachment: Attachment) -> list[tuple[str, nn.Module]]:
    """The modules that hooks stand on, and those around them, with their names: compiled, they would pass hooks by."""
    hooked = {id(module) for site in attachment.sites for module in site.modules()}
    if attachment.tower is not None:
        hooked |= {id(module) for module in attachment.tower.modules()}
    modules = dict(attachment.model.named_modules())
    around = {""}
    for name in (name for name, module in modules.items() if id(module) in hooked):
        parts = name.split(".")
        around |= {".".join(parts[: place + 1]) for place in range(len(parts))}
    return [(name or type(modules[name]).__name__, modules[name]) for name in sorted(around if hooked else ())]


def check_model(attachment: Attachment) -> None:
    """Raise ``ValueError`` for a model whose modules do not run as they are, so that hooks would be passed by."""
    for site in attachment.sites:
        site.check()
    name = type(attachment.model).__name__
    compiled = [f"{name}.forward"] if hasattr(attachment.model.forward, "_torchdynamo_orig_callable") else []
    compiled += [name for name, module in attachment.standing if module._compiled_call_impl is not None]
    if compiled:
        raise ValueError(
            f"{compiled[0]} was compiled, so {type(attachment.reducer).__name__} cannot act inside it: compile the "
            "layers' feed-forward networks instead (runtime=cuda_compile does), or nothing"
        )


def check_call(attachment: Attachment, call: Call, inputs: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for what a call cannot do with the reducer that is attached."""
    check_model(attachment)
    for name in ("inputs_embeds", "mm_encoder_outputs"):
        if inputs.get(name) is not None:
            raise ValueError(
                f"{name} hides the visual tokens from the reducer: pass input_ids and the pictures instead"
            )
    generation, defaults = call.generating, attachment.model.generation_config
    cache = cache_of(inputs)
    found, speculates = caches.lost(cache), _speculates(inputs, defaults) if generation else None
    if speculates and inputs.get("assistant_model") is attachment.model:
        raise ValueError(
            "assistant_model is the model that is reduced, which cannot guess for itself: give a copy of it"
        )
    if found is not None and found.stages and not any(isinstance(site, DecoderSite) for site in attachment.sites):
        raise ValueError(
            "this key-value cache holds a prompt that was reduced inside the language model, where "
            f"{type(attachment.reducer).__name__} does not act: go on with the reducer that it was made with"
        )
    if found is not None and speculates and cache.get_seq_length():
        raise ValueError(f"{speculates} does not go with past_key_values of an earlier turn: leave one of them out")
    if not attachment.brings_pictures(inputs) or not attachment.steps:
        return
    masks.check(inputs.get("attention_mask"))
    if cache is not None and (cache.get_seq_length() or found is not None):
        raise ValueError("pictures in a later turn need the whole conversation again: call without past_key_values")
    if attachment.asks and attachment.question is None:
        name = type(attachment.reducer).__name__
        raise ValueError(f"{name} reads the question: pass question= to reduce_tokens")
    if generation:
        refuse_chunks(inputs, defaults)
        return
    if inputs.get("labels") is not None:
        raise ValueError("labels do not fit the shortened sequence: compute the loss from the logits yourself")
    if isinstance(inputs.get("logits_to_keep"), Tensor):
        raise ValueError(
            "logits_to_keep as indices does not fit the shortened sequence: give a number of last positions"
        )


def _speculates(inputs: Mapping[str, Any], defaults: Any) -> str | None:
    """The argument by which tokens are guessed ahead, if there is one."""
    if inputs.get("assistant_model") is not None:
        return "assistant_model"
    return "prompt_lookup_num_tokens" if setting("prompt_lookup_num_tokens", inputs, defaults) else None
