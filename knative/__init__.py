"""A single-machine Knative Serving: the YAML of a cluster, run as processes of this machine."""
