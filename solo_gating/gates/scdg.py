"""Structured contrastive dual gating (SCDG): CDG with one decision for eight channels."""

from .base import register_gate
from .cdg import ContrastiveDualGate


@register_gate("scdg")
class StructuredDualGate(ContrastiveDualGate):
    """SCDG: eight neighbouring output channels share τ, and a decision from the mean of their bases.

    So a mask has an eighth of CDG's bits. Source, assumptions and arguments are those of CDG.
    """

    run = 8
