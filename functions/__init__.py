"""What runs in a stage's container: a Functions Framework function over a span of transformer blocks."""

import os

# How long torch's OpenMP threads look for more work before they sleep; read once, when torch is imported. By default it
# is milliseconds, in which they keep the cores from the next stage of the chain; not at all, and they have to be woken
# for each product. With two stages on two cores a token took 27 ms so, 32 by default and 35 with 0 (2026-11-28), and on
# busy cores the default took 836 ms where 2,000 took 46.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
