"""Named test problems, the tolerance rule, and a self-test of the installation."""
