"""The handlers, one module for each HTTP surface."""
