"""Inputs by modality: what a model's forward asks for, in the shapes that models of its kind take."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from .exceptions import IMAGES, INPUTS
from .sizes import FIRST_TOKEN, LAST_TOKEN

LENGTH = 24
DECODER_LENGTH = 10
# More than any model has bins of a spectrogram.
FRAMES = 160
_SAMPLES = 4000

_ONES = torch.ones(2, FRAMES, dtype=torch.long)

Inputs = dict[str, Any]


def attempt(run: Callable[..., Any], given: Inputs) -> tuple[Any, Exception | None]:
    """Returns what a function makes of inputs, or the error that it raises."""
    try:
        with torch.no_grad():
            return run(**given), None
    except Exception as error:
        return None, error


def parameters(model: PreTrainedModel) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a model's forward."""
    return dict(inspect.signature(model.forward).parameters)


def tokens(length: int = LENGTH, size: int = 2) -> torch.Tensor:
    """Returns ids of ordinary tokens, `[B, S]`, always the same ones."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(FIRST_TOKEN, LAST_TOKEN + 1, (size, length), generator=generator)


def noise(*shape: int) -> torch.Tensor:
    """Returns normal numbers, always the same ones."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def find(config: Any, *names: str) -> Any:
    """Returns the first number or list of that name in a configuration or its parts; `None` if there is none."""
    parts = [config]
    for part in parts:
        parts += [getattr(part, name, None) for name in getattr(part, "sub_configs", {})]
    for part, name in itertools.product(parts, names):
        value = getattr(part, name, None)
        if isinstance(value, int | list | tuple) and not isinstance(value, bool):
            return value
    return None


def _number(config: Any, *names: str, otherwise: int) -> int:
    value = find(config, *names)
    value = value[-1] if isinstance(value, list | tuple) and value else value
    return value if isinstance(value, int) else otherwise


def images(config: Any) -> list[torch.Tensor]:
    """Returns a batch of images in the layouts that models take: images, several of each, videos."""
    size = find(config, "image_size", "input_size", "img_size", "crop_size") or 64
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    channels = _number(config, "num_channels", "in_channels", "in_chans", otherwise=3)
    frames = _number(config, "num_frames", "frames_per_clip", otherwise=4)
    return [
        noise(2, channels, height, width),
        noise(2, frames, channels, height, width),
        noise(2, 3, 64, 64),
        noise(2, 1, channels, height, width),
        noise(2, 2, channels, height, width),
        noise(2, channels, frames, height, width),
    ]


def _features(config: Any) -> list[torch.Tensor]:
    names = ("num_mel_bins", "input_feat_per_channel", "feature_size", "input_size", "mel_bins", "input_dim")
    bins = _number(config, *names, otherwise=80)
    positions = find(config, "max_source_positions")
    whole = 2 * positions if isinstance(positions, int) else FRAMES
    return [
        noise(2, bins, whole),
        noise(2, FRAMES, bins),
        noise(2, bins, FRAMES),
        noise(2, 1, bins, whole),
        noise(2, FRAMES, 2 * bins),
        noise(2, 1, FRAMES, bins),
        noise(2, _SAMPLES),
    ]


def _feature_masks(config: Any) -> list[torch.Tensor]:
    positions = find(config, "max_source_positions")
    # As long as the features first: a shorter mask would make some of them padding.
    whole = [torch.ones(2, 2 * positions, dtype=_ONES.dtype)] if isinstance(positions, int) else []
    return [*whole, _ONES]


def _waves(config: Any) -> list[torch.Tensor]:
    length, bins = getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)
    spectrogram = [noise(2, length, bins)] if isinstance(length, int) and isinstance(bins, int) else []
    return [*spectrogram, noise(2, _SAMPLES), noise(2, 1, _SAMPLES)]


def patches(config: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the patches of two images of `4 x 4` and their grids, as models of any resolution take them."""
    channels = _number(config, "num_channels", "in_channels", "in_chans", otherwise=3)
    size = _number(config, "patch_size", otherwise=8)
    frames = _number(config, "temporal_patch_size", otherwise=1)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    yield noise(32, channels * frames * size * size), grid
    yield noise(32, channels, size, size), grid
    yield noise(32, channels * size * size), grid
    yield noise(32, channels * size * size), grid[:, 1:]
    yield noise(32, channels, size, size), grid[:, 1:]


def _boxes(config: Any) -> list[torch.Tensor]:
    del config
    corner = tokens() * 4
    return [torch.stack([corner, corner, corner + 60, corner + 20], dim=-1)]


def _embeddings(config: Any) -> list[torch.Tensor]:
    return [noise(2, LENGTH, _number(config, "hidden_size", "d_model", otherwise=64))]


# What makes an input, by its name in the forward.
_MAKERS: dict[str, Callable[[Any], list[torch.Tensor]]] = {
    "bbox": _boxes,
    "decoder_input_ids": lambda config: [tokens(DECODER_LENGTH)],
    "input_features": _features,
    "input_ids": lambda config: [tokens()],
    "input_values": _waves,
    **dict.fromkeys(("feature_attention_mask", "input_features_mask"), _feature_masks),
    **dict.fromkeys(("flattened_patches", "pixel_values", "pixel_values_videos"), images),
    **dict.fromkeys(("inputs_embeds", "latents", "query_embeds"), _embeddings),
}


def _choices(model: PreTrainedModel, name: str) -> list[torch.Tensor]:
    return _MAKERS[name](model.config) if name in _MAKERS else []


def _needed(model: PreTrainedModel) -> list[str]:
    """Returns the names of what the forward needs."""
    known = parameters(model)
    needed = [
        name
        for name, one in known.items()
        if one.default is inspect.Parameter.empty and one.kind is one.POSITIONAL_OR_KEYWORD
    ]
    main = model.main_input_name
    if main in known and main not in needed:
        needed.append(main)
    if model.config.is_encoder_decoder and "decoder_input_ids" in known:
        needed.append("decoder_input_ids")
    return needed


def _grid(model: PreTrainedModel) -> str | None:
    names = ("image_grid_thw", "grid_thw", "image_grid_hws", "grid_hws", "image_grid_hw")
    return next((name for name in names if name in parameters(model)), None)


def candidates(model: PreTrainedModel) -> Iterator[Inputs]:
    """Yields inputs for a model, those that are most likely right first."""
    kind = model.config.model_type
    if kind in INPUTS:
        yield INPUTS[kind](model)
        return
    known, needed, grid = parameters(model), _needed(model), _grid(model)
    if grid is not None and "input_ids" not in known:
        name = next(one for one in ("hidden_states", "pixel_values") if one in known)
        for values, sizes in patches(model.config):
            yield {name: values, grid: sizes}
            if "merge_sizes" in known:
                yield {name: values, grid: sizes, "merge_sizes": torch.tensor([2, 2])}
        return
    others = ("pixel_values", "input_ids", "input_features", "input_values", "bbox", "input_features_mask")
    optional = [name for name in others if name in known and name not in needed]
    # What generates text does so without images; what compares text and images needs both.
    for names in (needed, *([*needed, one] for one in optional), [*needed, *optional]):
        for values in itertools.product(*(_choices(model, name) for name in names)):
            yield dict(zip(names, values, strict=True))


def missing(model: PreTrainedModel) -> list[str]:
    """Returns the names of inputs for which no rule makes values."""
    return [name for name in _needed(model) if not _choices(model, name)]


def _sequence(model: PreTrainedModel, token: int, count: int) -> Inputs:
    """Returns text around the places of an image's features."""
    before, after = tokens(LENGTH)[:, :5], tokens(LENGTH)[:, 5:]
    ids = torch.cat([before, torch.full((2, count), token), after], dim=1)
    given: Inputs = {"input_ids": ids}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in parameters(model):
            given[name] = (ids == token).long()
    return given


def _tokens_per_image(features: Any, width: int) -> int:
    features = getattr(features, "pooler_output", features)
    if isinstance(features, list | tuple):
        features = features[0] if isinstance(features[0], list | tuple) else features
        total = sum(one.numel() for one in features)
    else:
        total = features.numel()
    return int(total) // width // 2


def with_images(model: PreTrainedModel) -> Iterator[Inputs]:
    """Yields text with two images, one in each row, for a model that reads both."""
    if model.config.model_type in IMAGES:
        yield IMAGES[model.config.model_type](model)
        return
    token = find(model.config, "image_token_id", "image_token_index")
    if not isinstance(token, int) or not hasattr(model, "get_image_features"):
        return
    width = model.get_input_embeddings().weight.shape[-1]
    grid, known = _grid(model), parameters(model)
    if grid is None:
        choices = [{"pixel_values": one} for one in images(model.config)]
        if "image_sizes" in known:
            sizes = torch.tensor([list(choices[0]["pixel_values"].shape[2:])] * 2)
            choices = [given | {"image_sizes": sizes} for given in choices] + choices
    else:
        choices = [{"pixel_values": values, grid: sizes} for values, sizes in patches(model.config)]
    for given in choices:
        features, error = attempt(model.get_image_features, given)
        # The next layout may be right.
        if error is None:
            yield given | _sequence(model, token, _tokens_per_image(features, width))
