"""What the orchestrator and a stage promise each other: messages, wire format, errors, checkpoint layout.

This is the only part of `functions` that the orchestrator imports. It never imports torch (a test holds that).
"""
