"""Attribute names of a node that carry structure, and no hyper-parameter.

A frontend writes them and a backend reads them; the printer leaves out all that begin with ``_``.
"""

STATE = "_pytree__state"
"""Two bools: whether an NNX object is initialising, and whether its setup has run."""
NODES = "_pytree__nodes"
"""Which attributes of an NNX object are data, by their names."""
TREE = "_pytree__def"
"""A `Template`: the definition of a container that is neither list, tuple nor dict."""
KEYS = "_pytree__keys"
"""The names of that container's children, in the order of the template's holes."""
NAMES = "_pytree__names"
"""The keys of a dict that are neither str nor int, by the names of the children."""
GRAPHDEF = "_linsey__graphdef"
"""In the attributes of a wrapper: the graphdef that its Linen variables hold."""
GRAPH_COLLECTION = "nnx"
"""The collection of Linen variables in which such a graphdef lies; it has no slots."""
LIFTED = "_linsey__lifted"
"""In the attributes of a wrapper that is a replaced Linen module: the collections that reach it."""
