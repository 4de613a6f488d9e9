"""This process among its peers: coordinates, watch, device memory."""
