"""Warnings about prompts that are too long for text encoders; numbers of tokens."""
