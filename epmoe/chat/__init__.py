"""A conversation in the terminal: `epmoe chat`.

command.py    config → a source of answers → the conversation
local.py      the model in this process
remote.py     that of a server, through HTTP
talk.py       whose turn it is, and what has been said
screen.py     lines in, text out, on a terminal or through pipes
"""
