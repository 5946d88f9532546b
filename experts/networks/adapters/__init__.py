"""Conventions of the network classes: what they take, return and can do; imports neither torch nor diffusers."""
