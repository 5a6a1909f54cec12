"""What runs in a stage's container: a Functions Framework function over a span of transformer blocks."""
