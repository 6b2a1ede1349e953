"""From a model's name to a pipeline that is ready to run."""
