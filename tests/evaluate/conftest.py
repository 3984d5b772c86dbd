"""The runs that several files evaluate."""

from ..support.encoders import dual, plain, trained  # noqa: F401
