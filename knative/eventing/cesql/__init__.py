"""CloudEvents SQL expressions (CESQL 1.0): text -> lexer -> parser -> an expression that is evaluated for each event.

There is no CESQL library for Python, so this is a small one of our own; it passes the specification's test kit.
`AND`, `OR` and `XOR` are of one rank and group from the right (`a AND b OR c` is `a AND (b OR c)`), and `NOT` binds
tighter than anything else, as in the specification's grammar and in the Go SDK that Knative uses.
"""
