"""epmoe's parts inside other libraries. Nothing else of the package imports this folder; each part imports its library.

transformers/    its models run epmoe's experts: an experts implementation, expert parallelism by slots, a quantiser
"""
