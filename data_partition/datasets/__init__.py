"""Read images from folders, WebDataset shards and packaged data sets."""
