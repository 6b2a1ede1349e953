"""Measurements of the server and of its parts."""
