"""Data sources: image folders, WebDataset tars and packaged data sets."""
