"""Every site of a step, alone and together, on ragged batches, in prefill and decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration as Model
from transformers import StaticCache

from tokenreduce import create, reduce_tokens
from tokenreduce.attach.bare import reduce_decoder_tokens
from tokenreduce.models.loading import load
from tokenreduce.reducer import (
    AtDecoder,
    AtEncoder,
    AtEncoderOutput,
    AtInput,
    AtProjector,
    Geometry,
    Keep,
    Selection,
    Span,
    Step,
    TokenReducer,
    VisualTokens,
    best,
)
from tokenreduce.signals import (
    ClassToken,
    DecoderAttention,
    DecoderHidden,
    EncoderAttention,
    EncoderHidden,
    LookAheadAttention,
    ProjectedFeatures,
    TextEmbeddings,
    TokenSizes,
)
from tokenreduce.testing import check_reducer, prompts, tiny_llava
from tokenreduce.testing.checkpoints import ask, picture

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}


@dataclass(frozen=True)
class LastQuery(TokenReducer):
    """Keeps what the last token of the prompt attended to one layer earlier."""

    keep: Keep = 0.5
    layer: int = 2

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtDecoder(layer=self.layer, keep=self.keep, sees=(DecoderAttention(self.layer - 1),))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(best(tokens[step.sees[0]].mean(-1)[0], tokens.keep))


@dataclass(frozen=True)
class Stages(TokenReducer):
    """Drops in three stages what the next layer is about to look away from."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtDecoder(layer=n, keep=2.0**-n, sees=(LookAheadAttention(),)) for n in (1, 2, 3)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(best(tokens[LookAheadAttention()].mean(-1)[0], tokens.keep))


@dataclass(frozen=True)
class Withdraw(TokenReducer):
    """Drops everything."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtDecoder(layer=2)]

    def count(self, step: Step, span: Span) -> int:
        return 0

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        return Selection(torch.arange(0))


@dataclass(frozen=True)
class EverySignal(TokenReducer):
    """Acts at the input, at the projector and in the language model, and looks at whatever there is."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        seen = (EncoderAttention(-2), EncoderHidden(0), *((ClassToken(),) if geometry.class_token else ()))
        inside = (ProjectedFeatures(), TextEmbeddings(), DecoderHidden(normed=True), DecoderHidden())
        return [
            AtInput(keep=0.7),
            AtEncoderOutput(keep=0.9, sees=seen),
            AtProjector(keep=0.5, sees=seen),
            AtDecoder(layer=2, keep=0.5, sees=inside),
        ]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        for signal in step.sees:
            value = tokens[signal]
            if isinstance(signal, EncoderAttention):
                assert value.mean().shape == (len(tokens), len(tokens))
            if isinstance(signal, EncoderHidden):
                assert len(value) == len(tokens)
            if isinstance(signal, ProjectedFeatures):
                assert value[tokens.index].shape == tokens.features.shape
        return Selection(torch.arange(tokens.keep) + 1)


@dataclass(frozen=True)
class Adaptive(TokenReducer):
    """Keeps as many as the picture says, doubled, behind a row that stands for no token."""

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtEncoderOutput(sees=(EncoderAttention(-2),))]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        received = tokens[EncoderAttention(-2)].mean().mean(0)
        kept = best(received, int(received[0] * 1e4) % 7 + 3)
        rows = torch.cat([tokens.features[:1], tokens.features[kept] * 2])
        return Selection(torch.cat([torch.tensor([-1]), kept]), rows)


@dataclass(frozen=True)
class MergeTail(TokenReducer):
    """In three encoder layers, merges the last five tokens into one that counts for all of them."""

    where: Any = "attention"

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [AtEncoder(layer=n, where=self.where, sees=(EncoderAttention(n), TokenSizes())) for n in range(3)]

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        assert tokens[step.sees[0]].mean().shape == (len(tokens), len(tokens))
        sizes, left = tokens[TokenSizes()], len(tokens) - 4
        source = torch.arange(len(tokens)).clamp(max=left - 1)
        summed = torch.zeros(left, tokens.features.shape[1]).index_add(0, source, tokens.features * sizes[:, None])
        merged = torch.zeros(left).index_add(0, source, sizes)
        return Selection(torch.arange(left), summed / merged[:, None], source, merged)


REDUCERS: list[TokenReducer] = [
    LastQuery(), Stages(), Withdraw(), EverySignal(), Adaptive(), MergeTail(), MergeTail("block")
]  # fmt: skip


def _name(reducer: TokenReducer) -> str:
    return type(reducer).__name__


@pytest.mark.parametrize(
    ("tower", "images"), [("clip", [1]), ("clip", [1, 3, 0, 2]), ("siglip", [1, 3, 0, 2])], ids=str
)
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("reducer", REDUCERS, ids=_name)
def test_the_invariants_hold_at_every_site(tower: Any, reducer: Any, positions: Any, images: list[int]) -> None:
    model = tiny_llava() if tower == "clip" else tiny_llava(tower="siglip", key_heads=2)
    check_reducer(type(reducer)(**{**reducer.knobs(), "positions": positions}), model, prompts(model, images))


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("reducer", [LastQuery(), Stages(), Withdraw()], ids=_name)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cuts_inside_hold_through_decoding(attention: str, reducer: Any, positions: Any) -> None:
    model = tiny_llava(attention=attention)
    batch = prompts(model, [1, 3, 0, 2])
    reducer = type(reducer)(positions=positions)
    with reduce_tokens(model, reducer):
        together = model.generate(**batch, **GREEDY)[:, -5:]
        beams = model.generate(**batch, do_sample=False, max_new_tokens=5, num_beams=3, num_return_sequences=2)
        for row in range(4):
            single = _row(model, batch, row)
            assert torch.equal(model.generate(**single, **GREEDY)[0, -5:], together[row])
            alone = model.generate(**single, do_sample=False, max_new_tokens=5, num_beams=3, num_return_sequences=2)
            assert torch.equal(alone[:, -5:], beams[2 * row : 2 * row + 2, -5:])
            assert torch.equal(model.generate(**single, **GREEDY, prompt_lookup_num_tokens=2)[0, -5:], together[row])
        single = _row(model, batch, 0)
        first = model.generate(**single, **GREEDY, return_dict_in_generate=True)
        assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
        ids = torch.cat([first.sequences, torch.full((1, 3), 17)], dim=1)
        mask = torch.ones_like(ids)
        kept_on = model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GREEDY)
    # The same conversation by a hand-written loop, one token at a time on the cache of the first turn.
    with reduce_tokens(model, reducer), torch.no_grad():
        cache = model.generate(**single, **GREEDY, return_dict_in_generate=True).past_key_values
        start, tokens = cache.get_seq_length(), ids
        logits = None
        for column in range(start, ids.shape[1] + 4):
            place = torch.tensor([[column]])
            logits = model(input_ids=tokens[:, column : column + 1], past_key_values=cache, position_ids=place).logits
            if column >= ids.shape[1] - 1:
                tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, kept_on[:, : tokens.shape[1]])


def test_lengths_are_those_of_the_layers(llava: Model) -> None:
    with reduce_tokens(llava, Stages()) as attachment:
        out = llava.generate(**prompts(llava, [1]), **GREEDY, return_dict_in_generate=True)
    (sample,) = attachment.samples
    text = sample.lengths[0] - 36
    assert sample.lengths == (36 + text, 18 + text, 9 + text, 4 + text)
    cached = [layer.get_seq_length() for layer in out.past_key_values.layers]
    assert cached == [length + 4 for length in sample.lengths]
    assert [len(step.index) for step in sample.images[0].steps] == [18, 9, 4]
    assert {step.site for step in sample.images[0].steps} == {f"decoder layer {n}" for n in (1, 2, 3)}


def test_without_a_cache_every_step_chooses_again(llava: Model) -> None:
    with reduce_tokens(llava, LastQuery()):
        out = llava.generate(**prompts(llava, [1]), **GREEDY, use_cache=False)
    assert out.shape[1] == prompts(llava, [1])["input_ids"].shape[1] + 5


def test_a_cache_of_one_length_is_refused(llava: Model) -> None:
    inputs = prompts(llava, [1])
    cache = StaticCache(config=llava.config.text_config, max_cache_len=64)
    with reduce_tokens(llava, LastQuery()), pytest.raises(ValueError, match="StaticCache needs layers of one length"):
        llava(**inputs, past_key_values=cache)


def test_a_cut_at_layer_0_is_refused(llava: Model) -> None:
    with pytest.raises(ValueError, match="use AtProjector"), reduce_tokens(llava, LastQuery(layer=0)):
        pass


def test_prefill_in_chunks_is_refused(llava: Model) -> None:
    with reduce_tokens(llava, LastQuery()), pytest.raises(ValueError, match="prefill_chunk_size"):
        llava.generate(**prompts(llava, [1]), **GREEDY, prefill_chunk_size=5)


def test_block_masks_are_refused() -> None:
    model = tiny_llava()
    model.model.language_model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention's block masks"), reduce_tokens(model, LastQuery()):
        pass


def test_steps_out_of_order_are_refused(llava: Model) -> None:
    class Backwards(EverySignal):
        def steps(self, geometry: Geometry) -> Sequence[Step]:
            return [AtProjector(keep=0.5), AtInput(keep=0.5)]

    with pytest.raises(ValueError, match="in the order of the sites"), reduce_tokens(llava, Backwards()):
        pass


@dataclass(frozen=True)
class OneMore(TokenReducer):
    """Adds a row that stands for no token."""

    site: Any = AtProjector

    def steps(self, geometry: Geometry) -> Sequence[Step]:
        return [self.site()]

    def count(self, step: Step, span: Span) -> int:
        return span.current + 1

    def select(self, step: Step, tokens: VisualTokens) -> Selection:
        added = tokens.features.mean(dim=0, keepdim=True)
        index = torch.cat([tokens.index, tokens.index.new_tensor([-1])])
        return Selection(index, torch.cat([tokens.features, added]), tokens.index)


@pytest.mark.parametrize("site", [AtEncoderOutput, AtProjector])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_more_rows_than_a_prompt_has_places_are_refused(
    family: str, site: type[Step], checkpoint: Callable[[str], Path]
) -> None:
    model, processor = load(str(checkpoint(family)))
    message = r"OneMore leaves (\d+) rows of a tile that has (\d+) places in the prompt: keep at most \2"
    with reduce_tokens(model, OneMore(site)), pytest.raises(ValueError, match=message):
        model(**ask(processor, [[picture(0, 60, 40)]]))


def test_rows_without_a_place_may_go_before_the_prompt(llava: Model) -> None:
    chain = create("chain", reducers=[OneMore(AtEncoderOutput), create("uniform", keep=12)])
    with torch.no_grad(), reduce_tokens(llava, chain) as attachment:
        llava(**prompts(llava))
    assert [len(step.index) for step in attachment.samples[0].images[0].steps] == [37, 12]


def test_a_signal_from_another_site_is_refused(llava: Model) -> None:
    class Confused(EverySignal):
        def steps(self, geometry: Geometry) -> Sequence[Step]:
            return [AtProjector(keep=0.5, sees=(LookAheadAttention(),))]

    with (
        pytest.raises(ValueError, match=r"asks to see LookAheadAttention\(rotated=True\)"),
        reduce_tokens(llava, Confused()),
    ):
        pass


def test_a_bare_decoder_does_the_same(llava: Model) -> None:
    inputs = prompts(llava, [1])
    with reduce_tokens(llava, Stages()), torch.no_grad():
        expected = llava(**inputs).logits[0, -1]
    text_model = _language_model(llava)
    with torch.no_grad():
        embeddings = llava.get_input_embeddings()(inputs["input_ids"])
        visual = inputs["input_ids"][0] == llava.config.image_token_id
        embeddings[0, visual] = llava.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        places = visual.nonzero()[:, 0]
        span = int(places[0]), int(places[-1]) + 1
        with reduce_decoder_tokens(text_model, Stages(), [span]) as prefills:
            logits = text_model(inputs_embeds=embeddings).logits[0, -1]
    torch.testing.assert_close(logits, expected)
    assert [len(step.index) for step in prefills[0].strands[0].journey.tracks[0].steps] == [18, 9, 4]
    before = pytest.raises(ValueError, match="acts before the language model")
    with before, reduce_decoder_tokens(text_model, EverySignal(), [span]):
        pass


def _language_model(llava: Model) -> Any:
    """The LLaVA's language model as a causal language model of its own."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llava.config.text_config).eval()
    model.model = llava.model.language_model
    model.lm_head = llava.lm_head
    return model


def _row(model: Model, batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One prompt of ``batch`` by itself, without padding."""
    valid = batch["attention_mask"][row].bool()
    single = {name: batch[name][row, valid][None] for name in ("input_ids", "attention_mask")}
    counts = (batch["input_ids"] == model.config.image_token_id).sum(-1) // model.config.image_seq_length
    start = int(counts[:row].sum())
    if counts[row]:
        single["pixel_values"] = batch["pixel_values"][start : start + int(counts[row])]
    return single
