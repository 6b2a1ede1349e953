"""Tests of `stepweave.scheduling`, and of the clock that its cost model learns from."""
