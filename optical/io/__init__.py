"""Files, settings and a record of the environment."""
