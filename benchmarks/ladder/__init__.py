"""Compares the server with other ways to serve the embedded model: `python -m benchmarks.ladder`.

Each contestant is an HTTP server in a process of its own, with the same weights, pipeline class and
number of threads. They take turns; those whose turn it is not are suspended.
"""
