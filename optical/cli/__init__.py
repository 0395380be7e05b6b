"""The command line, `optical`."""
