"""The request path: ingress, activator, queue-proxy, and one relayed HTTP exchange to a replica's process."""
