"""Loads a model as a pipeline, and checks it before it serves requests."""
