"""Recurrent layers of patched models."""
