"""What is on disk: the .trit container, its codecs, and readers of the checkpoints it is made from."""

from .codecs import CODECS as CODECS
from .container import Tensor as Tensor
from .container import TritFile as TritFile
from .container import dequantize as dequantize
from .container import dequantize_rows as dequantize_rows
from .container import open_trit as open_trit
from .errors import BadMagicError as BadMagicError
from .errors import ChecksumError as ChecksumError
from .errors import FormatError as FormatError
from .errors import HeaderError as HeaderError
from .errors import SourceError as SourceError
from .errors import TensorError as TensorError
from .errors import TruncatedFileError as TruncatedFileError
from .errors import UnsupportedError as UnsupportedError
from .errors import UnsupportedVersionError as UnsupportedVersionError
from .version import __version__ as __version__
from .writer import TritWriter as TritWriter
