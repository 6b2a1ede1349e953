"""The modes that batch no steps, to compare with: off, threads and request."""
