"""Eventing on one machine: CloudEvents, Triggers' filters and delivery rules as Knative Eventing has them."""
