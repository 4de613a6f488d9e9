"""The configuration: what a key is (keys.py), every key (schema.py), and values for them all (compose.py)."""
