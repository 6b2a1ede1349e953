"""Images of a job's latents while it runs."""
