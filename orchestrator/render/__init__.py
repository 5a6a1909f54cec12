"""A plan as Kubernetes objects and files: what `render` writes, `up` applies and `deploy` sends to a cluster.

    Deployment ──► pods ──► Knative Services or InferenceServices ──┐
        │                                                          ├──► files
        └────────► what stands around them ────────────────────────┘

Everything here is pure but for `files.write`.
"""
