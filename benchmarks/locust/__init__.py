"""An open-loop capacity test of the HTTP API: `python -m benchmarks.locust --host
http://localhost:3000`.

Arrivals follow a seeded Poisson process at a stated rate, whatever the server answers, and latency
counts from the scheduled arrival: a server that stalls cannot slow its own test down and so hide
the stall (coordinated omission). Locust's own load is a closed loop, users that wait for their
answers, so here each arrival is a Locust user that sends one request and leaves.
"""
