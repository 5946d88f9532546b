"""Node pools that exist while they are needed: one typed configuration, rendered for the tool that starts the nodes.

A pool that is up is a Ray cluster of its own, and so an island, or several: one for each type of its nodes.
"""
