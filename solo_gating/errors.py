"""The one exception that is a user's mistake rather than a bug."""

from solo_gating_runtime.errors import InputError

__all__ = ["InputError"]
