"""What diffusers shares between calls, kept apart for each job."""
