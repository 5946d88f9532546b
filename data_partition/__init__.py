"""From a data set to K clusters that can each be read alone.

    source ──build_dataset──► shards ──extract_features──► features ──make_partition──► clusters/0 … K-1
                                                                                        assignment, balance

Open `dataset.py` to see how images become shards, `sources.py` for where they come from (add a source there),
`features.py` for the spaces in which clusters are found (add an extractor there), `division.py` for what else may
divide the samples, `partition.py` for the partition itself, `shards.py` to read or write shards, and `errors.py` for
everything that can go wrong.
"""
