"""The mixture-of-experts layer: router, experts, exchange."""
