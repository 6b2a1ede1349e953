"""A job: its caller's handle, the engine's side of it, and how it reaches the engine's thread."""
