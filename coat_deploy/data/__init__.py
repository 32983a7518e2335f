"""Labelled images to train on and to measure with: folders, digits, Hugging Face datasets."""
