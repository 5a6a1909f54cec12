"""Kubernetes objects as values: read, defaulted and validated as Knative's webhooks do it."""
