"""From a data set to K clusters that can be read independently.

    source ──build_dataset──► shards ──extract_features──► features ──make_partition──► clusters/0 … K-1
                                                                                        assignment, balance

datasets/       image sources, and how images become shards; add a source in `sources.py`
shards/         read and write shards
features/       feature spaces for clustering; add an extractor in `extract.py`
clustering/     k-means, and the strategies that divide the samples; add a strategy in `strategies.py`
partition.py    the partition itself
errors.py       all errors
"""
