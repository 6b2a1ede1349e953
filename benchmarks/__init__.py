"""Measurements of the server and of its parts."""

import os

# as the server does, and before torch is imported: OpenMP's threads must not spin while they wait
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
