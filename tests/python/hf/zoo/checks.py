"""What a patched model has to do as its eager twin does: forward, padded, generating, in pieces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .comparison import TIE, TOLERANCE, NotApplicableError, distance, relative
from .inputs import Inputs, attempt, parameters, with_images

NEW_TOKENS = 8
# What models call the cache that they take and return.
_CACHES = ("cache", "past_key_values", "cache_params")
_LEFT, _RIGHT, _FIRST_PIECE = 5, 7, 13


@dataclass(frozen=True)
class Run:
    """What a check does with a model, and how two results are compared.

    Attributes:
        compute: Runs a model.
        distance: Tells how far the second result is from the first, relative to the first.
        whole: Gives what pieces have to give together, from a model that cannot continue from its cache.
    """

    compute: Callable[[PreTrainedModel], Any]
    distance: Callable[[Any, Any], float]
    whole: Callable[[PreTrainedModel], Any] | None = None


def _call(model: PreTrainedModel, inputs: Inputs) -> Any:
    with torch.no_grad():
        return model(**inputs)


def _forward(model: PreTrainedModel, inputs: Inputs) -> Run:
    del model
    return Run(lambda one: _call(one, inputs), distance)


def _mask(shape: torch.Size, *, left: int = 0, right: int = 0) -> torch.Tensor:
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, :left] = 0
    if right:
        mask[-1, -right:] = 0
    return mask


def _time_axis(inputs: Inputs) -> torch.Size:
    for name in ("input_ids", "input_features", "input_values"):
        if name in inputs:
            # Features come with the time axis before or after the bins, of which there are fewer.
            size, *axes = inputs[name].shape
            return torch.Size((size, max(axes)))
    raise NotApplicableError("no tokens")


def _padded(model: PreTrainedModel, inputs: Inputs, *, left: int = 0, right: int = 0) -> Inputs:
    if "attention_mask" not in parameters(model):
        raise NotApplicableError("no attention_mask")
    given = dict(inputs)
    mask = _mask(_time_axis(inputs), left=left, right=right)
    given["attention_mask"] = mask
    if "input_ids" in given:
        given["input_ids"] = given["input_ids"].masked_fill(mask == 0, 0)
    # Models with several codebooks have a row of ids for each, and one of the mask for all.
    same_rows = "decoder_input_ids" in given and len(given["decoder_input_ids"]) == len(mask)
    if same_rows and "decoder_attention_mask" in parameters(model):
        mask = _mask(given["decoder_input_ids"].shape, left=left // 2, right=right // 2)
        given["decoder_attention_mask"] = mask
        given["decoder_input_ids"] = given["decoder_input_ids"].masked_fill(mask == 0, 0)
    return given


def _compare_tokens(given: Inputs) -> Callable[[Any, Any], float]:
    masks = [given[name] for name in ("attention_mask", "decoder_attention_mask") if name in given]
    if "decoder_input_ids" in given and "decoder_attention_mask" not in given:
        masks.append(torch.ones_like(given["decoder_input_ids"]))
    return lambda actual, expected: distance(actual, expected, *masks)


def _right(model: PreTrainedModel, inputs: Inputs) -> Run:
    given = _padded(model, inputs, right=_RIGHT)
    return Run(lambda one: _call(one, given), _compare_tokens(given))


def _left(model: PreTrainedModel, inputs: Inputs) -> Run:
    if "input_ids" not in inputs:
        raise NotApplicableError("no tokens")
    given = _padded(model, inputs, left=_LEFT)
    return Run(lambda one: _call(one, given), _compare_tokens(given))


def _sequences(output: Any) -> torch.Tensor:
    found = output if isinstance(output, torch.Tensor) else getattr(output, "sequences", None)
    if found is None:
        raise NotApplicableError("generates no tokens")
    return found


def _compare_generated(actual: Any, expected: Any) -> float:
    if getattr(expected, "logits", None) is None:
        # Models with a generate of their own return what they like.
        return 0.0 if torch.equal(_sequences(actual), _sequences(expected)) else float("inf")
    worst = 0.0
    for step, (ours, theirs) in enumerate(zip(actual.logits, expected.logits, strict=True)):
        worst = max(worst, relative(ours, theirs))
        index = expected.sequences.shape[1] - len(expected.logits) + step
        chosen = [one.sequences[..., index].reshape(-1) for one in (actual, expected)]
        if not torch.equal(*chosen):
            logits = theirs.reshape(len(chosen[0]), -1)
            rows = torch.arange(len(logits))
            gap = (logits[rows, chosen[1]] - logits[rows, chosen[0]]).abs().max() / logits.abs().max()
            # After a tie the sequences go separate ways.
            return worst if float(gap) <= TIE else max(worst, float(gap), 2 * TOLERANCE)
    return worst


def _generate(model: PreTrainedModel, inputs: Inputs, *, left: int = 0, **options: Any) -> Run:
    if not model.can_generate():
        raise NotApplicableError("does not generate")
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    if "input_ids" in given and "attention_mask" in parameters(model):
        mask = _mask(given["input_ids"].shape, left=left)
        given |= {"attention_mask": mask, "input_ids": given["input_ids"].masked_fill(mask == 0, 0)}
    elif left:
        raise NotApplicableError("no tokens to pad")

    def compute(one: PreTrainedModel) -> Any:
        with torch.no_grad():
            return one.generate(
                **given,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                output_logits=True,
                return_dict_in_generate=True,
                pad_token_id=0,
                **options,
                **({"decoder_start_token_id": 1} if one.config.is_encoder_decoder else {}),
            )

    return Run(compute, _compare_generated)


def _generate_padded(model: PreTrainedModel, inputs: Inputs) -> Run:
    return _generate(model, inputs, left=_LEFT)


def _generate_static(model: PreTrainedModel, inputs: Inputs) -> Run:
    left = _LEFT if "input_ids" in inputs else 0
    return _generate(model, inputs, left=left, cache_implementation="static")


def _chunked(model: PreTrainedModel, inputs: Inputs, *, left: int = 0) -> Run:
    keyword = next((name for name in _CACHES if name in parameters(model)), None)
    if model.config.is_encoder_decoder or not model.can_generate() or keyword is None:
        raise NotApplicableError("no decoder with a cache")
    if set(inputs) != {"input_ids"}:
        raise NotApplicableError("more than tokens")
    mask = _mask(inputs["input_ids"].shape, left=left)
    ids = inputs["input_ids"].masked_fill(mask == 0, 0)

    def compute(one: PreTrainedModel) -> Any:
        past, outputs = None, []
        for start, end in ((0, _FIRST_PIECE), (_FIRST_PIECE, ids.shape[1])):
            given: Inputs = {"input_ids": ids[:, start:end], keyword: past, "use_cache": True}
            if left:
                given["attention_mask"] = mask[:, :end]
            output = _call(one, given)
            past = next((output[name] for name in _CACHES if output.get(name) is not None), None)
            if past is None:
                raise NotApplicableError("returns no cache")
            outputs.append(output.logits)
        return torch.cat(outputs, dim=1)

    def whole(one: PreTrainedModel) -> Any:
        return _call(one, {"input_ids": ids, **({"attention_mask": mask} if left else {})}).logits

    return Run(compute, lambda actual, expected: distance(actual, expected, mask), whole)


def _chunked_padded(model: PreTrainedModel, inputs: Inputs) -> Run:
    if "attention_mask" not in parameters(model):
        raise NotApplicableError("no attention_mask")
    return _chunked(model, inputs, left=_LEFT)


def _first_with_images(model: PreTrainedModel) -> Inputs:
    first: Exception = NotApplicableError("takes no images")
    for number, given in enumerate(with_images(model)):
        _, error = attempt(model, given)
        if error is None:
            return given
        first = first if number else error
    raise first


def _image(model: PreTrainedModel, inputs: Inputs) -> Run:
    del inputs
    return _left(model, _first_with_images(model))


def _image_generate(model: PreTrainedModel, inputs: Inputs) -> Run:
    del inputs
    return _generate_padded(model, _first_with_images(model))


CHECKS: dict[str, Callable[[PreTrainedModel, Inputs], Run]] = {
    "forward": _forward,
    "padded right": _right,
    "padded left": _left,
    "generate": _generate,
    "generate padded": _generate_padded,
    "generate static": _generate_static,
    "in pieces": _chunked,
    "in pieces padded": _chunked_padded,
    "image": _image,
    "image generate": _image_generate,
}
