"""Runs gated encoders on CPUs: needs NumPy and a C++ compiler, and neither PyTorch nor solo-gating."""
