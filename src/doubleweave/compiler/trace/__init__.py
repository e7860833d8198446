"""Any nn.Module to one functional graph with the named modules as nodes.

Imports compiler.graph, the policy and ir; knows nothing of segments or backends.
"""
