"""Models served over the network, in the Open Inference Protocol (KServe v2) and for images."""
