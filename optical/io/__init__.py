"""Files, configuration files and the recorded environment; this wing imports no other."""
