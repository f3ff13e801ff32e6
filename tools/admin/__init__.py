"""`vlmrt admin`: see and steer a running service."""
