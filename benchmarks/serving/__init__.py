"""Compares policies and modes of the real server under load: `python -m benchmarks.serving`.

Each contestant is its own `bentoml serve`, started once and idle while another is under load. All
get the same requests at the same offsets, as an open loop: arrivals do not wait for answers, and
latency counts from the scheduled arrival.
"""
