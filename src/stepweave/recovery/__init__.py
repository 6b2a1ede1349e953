"""What is done when a step has shown that something is wrong: jobs restart, or take turns."""
