"""What the machine calls itself, for reports and for the names of records."""

import platform
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def _describe(cpuinfo: str) -> str | None:
    first = cpuinfo.partition("\n\n")[0]
    fields: dict[str, str] = dict(re.findall(r"^([^\n:]*?)\s*: *(.*)$", first, flags=re.MULTILINE))
    name = fields.get("model name")
    if name is None:
        return None
    # Virtual machines often hide the product ("AMD EPYC"); family and model still tell the generations apart.
    if {"cpu family", "model"} <= fields.keys():
        return f"{name.strip()} (family {fields['cpu family']}, model {fields['model']})"
    return name.strip()


def cpu_name() -> str:
    """Returns the processor's name with family and model, or the architecture's name."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return _describe(text) or platform.processor() or platform.machine() or "unknown"


def slug(name: str) -> str:
    """Returns `name` as a directory name: lower-case letters, digits and single hyphens.

    `"AMD EPYC (family 26, model 2)"` gives `"amd-epyc-family-26-model-2"`.
    """
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-") or "unknown"
