"""The step loop: requests in, token ids out."""
