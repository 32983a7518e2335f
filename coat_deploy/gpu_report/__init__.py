"""One call on a machine with a GPU: every way to run a network there, checked and timed."""
