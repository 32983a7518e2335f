"""A model repository for NVIDIA's Triton Inference Server, of a model's artifacts."""
