"""Stepweave: a diffusion model server that batches denoising steps, not requests."""

__version__ = "0.1.0"
