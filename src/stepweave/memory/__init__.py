"""What fits into the device's memory, and whether the device still works."""
