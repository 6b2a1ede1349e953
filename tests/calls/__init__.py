"""What requests may say to a pipeline."""
