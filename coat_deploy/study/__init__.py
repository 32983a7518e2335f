"""What the parts of the network are worth, and what each variant costs: the paper's tables."""
