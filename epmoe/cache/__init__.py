"""The key/value cache: which rows hold what (pages · rows), a step's plan, the memory itself, what fits."""
