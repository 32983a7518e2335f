"""Train or load CoaT, export it, prove the export equal, measure it."""
