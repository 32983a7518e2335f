"""A manifest for KServe on Kubernetes: a model's server, as many copies as requests need."""
