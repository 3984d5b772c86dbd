"""From a trained checkpoint to what runs elsewhere: a fast engine, and exported files."""

from .engine import CompiledEncoder, compile

__all__ = ["CompiledEncoder", "compile"]
