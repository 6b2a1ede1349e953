"""Restarts jobs, or runs them one at a time, if a step has put results in doubt."""
