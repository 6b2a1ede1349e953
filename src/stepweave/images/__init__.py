"""Decodes uploads, and encodes images with their parameters."""
