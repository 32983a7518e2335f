"""The command line: one small file a command, `app.py` is the door."""
