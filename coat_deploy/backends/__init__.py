"""One file a runtime; `select.py` finds them by name."""
