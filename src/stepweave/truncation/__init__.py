"""What text encoders leave out of prompts that are too long for them."""
