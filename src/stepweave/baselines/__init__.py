"""The modes `off`, `threads` and `request`, which batch no steps, for comparison."""
