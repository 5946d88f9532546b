"""The HTTP service of ensembles, in the form of OpenAI's images interface; Ray Serve is its outermost layer."""
