"""The real server under load, its policies and modes side by side: `python -m benchmarks.serving`.

Each contestant is a `bentoml serve` of its own, started once and idle while another is under load.
All are sent the very same requests at the very same offsets, as an open loop: arrivals do not wait
for answers, and latency counts from the scheduled arrival.
"""
