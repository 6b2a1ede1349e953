"""An open-loop capacity test of the HTTP API: `python -m benchmarks.locust --host
http://localhost:3000`.

Arrivals follow a seeded Poisson process at a given rate, whatever the server answers, and latency
counts from the scheduled arrival: otherwise a server that stalls would slow down its own test and
hide the stall (coordinated omission). Locust's own load is a closed loop of users that wait for
answers, so here each arrival is a Locust user that sends a single request and stops.
"""
