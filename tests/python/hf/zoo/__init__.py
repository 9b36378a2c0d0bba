"""Every model of transformers that can be built tiny, patched and compared with its eager attention."""
