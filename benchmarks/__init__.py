"""Measurements of the server and of its parts."""

import os

# as in the server, and before the import of torch: OpenMP's threads must not spin while they wait
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
