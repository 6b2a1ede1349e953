"""Additions to a job's view in an engine: hooked modules, progress, previews, image threads."""
