"""Leaves the zoo out where configurations do not declare their fields: sizes are found by them."""

from dataclasses import is_dataclass
from importlib.util import find_spec

if find_spec("transformers") is None or find_spec("torch") is None:
    collect_ignore_glob = ["*"]
else:
    import transformers

    if not is_dataclass(getattr(transformers, "PreTrainedConfig", None)):
        collect_ignore_glob = ["*"]
