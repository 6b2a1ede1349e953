"""Jobs: the caller's handle, the engine's side, and the thread that runs them."""
