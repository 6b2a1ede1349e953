"""What a job's view of the pipeline has in an engine: progress, previews, images on threads."""
