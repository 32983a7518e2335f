"""The network on a GPU with fewer passes over memory: kernels, operators, a network that uses them.

`kernels.py` computes, in Triton's language; `launches.py` says with how many programs;
`plain.py` is the same in PyTorch, for any device; `operators.py` registers both as operators of
PyTorch; `fuse.py` puts them into a network.
"""
