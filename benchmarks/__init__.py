"""Measures Stagecraft beside its peers: bare HTTP, and Transformers on the same cores. Run `python -m benchmarks`."""
