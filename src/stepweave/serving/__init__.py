"""One server: requests, jobs, admission, the model's life from load to drain."""
