"""Which step runs next, and what is let in. Pure Python: the server and `benchmarks/simulate.py`
run this very code."""
