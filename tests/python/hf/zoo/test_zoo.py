"""Patched models do what their eager twins do, and `docs/hf_support.md` says what is so."""

from __future__ import annotations

import pytest
import transformers

from . import table
from .catalogue import Entry, entries
from .survey import survey

# One of each kind: decoders with and without windows, what is delegated, latent and shared keys, encoders, both, images,
# sound, and several in one.
REPRESENTATIVES = (
    *("llama", "mistral", "qwen3_moe", "gemma2", "gemma3", "gemma3n_text", "gpt_oss", "gpt2", "opt", "phi3"),
    *("deepseek_v3", "deepseek_v32", "deepseek_v4", "qwen3_next", "modernbert", "bert", "t5", "bart"),
    *("whisper", "wav2vec2", "vit", "clip", "siglip_vision_model", "qwen2_5_vl", "llava", "bloom"),
)
_ENTRIES = {one.kind: one for one in entries()}


def _check(entry: Entry) -> None:
    row = survey(entry)
    assert not row.failures
    if transformers.__version__ == table.documented_version():
        assert table.documented().get(entry.kind) == table.line(row), "the table is out of date: make zoo"


@pytest.mark.parametrize("kind", REPRESENTATIVES)
def test_representative(kind):
    if kind not in _ENTRIES:
        pytest.skip(f"this transformers has no {kind}")
    _check(_ENTRIES[kind])


@pytest.mark.zoo
@pytest.mark.parametrize("kind", sorted(_ENTRIES))
def test_model(kind):
    _check(_ENTRIES[kind])


def test_table_is_complete():
    if transformers.__version__ != table.documented_version():
        pytest.skip(f"the table is about transformers {table.documented_version()}")
    assert sorted(table.documented()) == sorted(_ENTRIES)
