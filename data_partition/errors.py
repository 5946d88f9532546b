"""Everything that can be wrong with data; each message says the rule, the value and the way out.

DataError
├── UrlRefused          a URL scheme that is not on the list
├── SourceMissing       nothing is where the images should be
├── DownloadFailed      a file could not be fetched, or is not the file that was meant
├── SourceUnreachable   a tar could not be opened; trying again may help
├── ShardError          a tar is missing, truncated, corrupt or hostile
├── UnprintableName     a class that no table could show
├── UnreadableImage     one image; counted, named and skipped up to a limit
│   └── TooManyUnreadable   … and this is beyond the limit
├── NoSamples           nothing is left to learn from, or to compare with
├── MixedSizes          an image is not of the size that was asked for
├── MissingLabels       a sample has no class
├── TooManyFeatures     a covariance would not fit into memory
├── MissingExtra        an optional package is not installed
├── UnknownExtractor    features of a kind that this version does not have
├── FeaturesMismatch    features were made from other samples
├── TooFewSamples       fewer samples than experts
└── EmptyCluster        an expert would have nothing to learn from
"""


class DataError(Exception):
    """The data cannot be used as they are."""


class UrlRefused(DataError):
    """A URL whose scheme is not on the list of allowed ones."""


class SourceMissing(DataError):
    """Nothing is where the images should be."""


class DownloadFailed(DataError):
    """A file could not be fetched, or is not the file that was meant."""


class SourceUnreachable(DataError):
    """A tar could not be opened: a network, a disk or a driver failed; trying again may help."""


class ShardError(DataError):
    """A tar is missing, truncated, corrupt, or holds what it must not hold."""


class UnprintableName(DataError):
    """A class whose name has characters that would act on a terminal instead of being shown."""


class UnreadableImage(DataError):
    """One image cannot be read."""


class TooManyUnreadable(UnreadableImage):
    """More images cannot be read than may be skipped."""


class NoSamples(DataError):
    """Nothing is left to learn from, or nothing to compare with."""


class MixedSizes(DataError):
    """An image is not of the size that was asked for."""


class MissingLabels(DataError):
    """A sample has no class, and classes were asked for."""


class TooManyFeatures(DataError):
    """A covariance matrix of so many features would not fit into memory."""


class MissingExtra(DataError):
    """An optional package is not installed."""


class UnknownExtractor(DataError):
    """Features of a kind that this version does not have."""


class FeaturesMismatch(DataError):
    """Features were made from other samples than those they are used with."""


class TooFewSamples(DataError):
    """There are fewer samples than experts."""


class EmptyCluster(DataError):
    """An expert would have nothing to learn from."""
