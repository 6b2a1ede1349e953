"""The real service with the policy in BENCHMARK_POLICY, for `python -m
benchmarks.serving.server`."""

from __future__ import annotations

import os
from functools import partial
from unittest.mock import patch

from benchmarks.policies import POLICIES
from benchmarks.serving.contestants import POLICY
from stepweave.serving.server import Server

with patch("stepweave.serving.server.Server", partial(Server, policy=POLICIES[os.environ[POLICY]])):
    from service import Stepweave

__all__ = ["Stepweave"]
