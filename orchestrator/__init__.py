"""Chains the stages of a model and answers users: planning, lanes, endpoints, command line."""
