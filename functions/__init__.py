"""What runs in a stage's container: a Functions Framework function over a span of transformer blocks."""

import os

# How long torch's OpenMP threads look for more work before they sleep; read once, when torch is imported. By default it
# is milliseconds, in which they keep the cores from the next stage of the chain: with two stages on two busy cores a
# step took 836 ms by default and 46 ms so (2026-11-28).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
