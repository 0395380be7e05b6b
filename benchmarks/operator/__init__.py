"""Speed, memory and accuracy of the operator against its peers; run by ``python -m benchmarks``."""
