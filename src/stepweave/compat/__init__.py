"""State that diffusers and torch share between calls, kept separate for each job."""
