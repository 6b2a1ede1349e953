"""What jobs cost, and when they will be done."""
