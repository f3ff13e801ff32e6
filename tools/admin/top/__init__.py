"""`vlmrt admin top`: a live view of a service on the whole terminal."""
