"""The HTTP surfaces, thin: they parse, call the server and shape the answer."""
