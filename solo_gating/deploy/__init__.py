"""From a trained checkpoint to what runs elsewhere: a fast engine, and exported files."""

from .engine import CompiledEncoder, compile, load

__all__ = ["CompiledEncoder", "compile", "load"]
