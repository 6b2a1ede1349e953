"""How calls of many jobs share one forward: described, merged, run, split."""
