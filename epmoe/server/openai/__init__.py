"""OpenAI's types: what of a request is served, and the objects of an answer. Nothing here knows of sockets."""
