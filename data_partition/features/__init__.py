"""Turn images into the features in which clusters are computed."""
