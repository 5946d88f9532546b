"""Node pools that grow and shrink with demand: one typed configuration, rendered for the tool that starts the nodes.

A running pool is a Ray cluster, which is used as one island for each type of its nodes.
"""
