"""Whether calls may share a forward: proven by running them both ways."""
