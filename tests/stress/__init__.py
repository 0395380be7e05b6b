"""Long-running checks: random calls, soak test, sanitizers and planted faults."""
