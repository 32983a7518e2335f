"""The CoaT network in PyTorch, one file a concept of the paper."""
