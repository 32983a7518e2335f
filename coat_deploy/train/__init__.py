"""Training: from labelled images to a model folder."""
